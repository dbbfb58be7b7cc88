"""Cache rows and tokens -> batches: which questions, in which order, in which sequences."""

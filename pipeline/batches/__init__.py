"""Batches from cached features and tokens: opening a split, sampling questions, building sequences."""

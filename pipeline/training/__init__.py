"""The trainer of stage two and its callbacks: validation, LoRA monitor, stopping, estimate."""

"""The model: checkpoint files, its two halves, attention, prefix tree, merging, device and memory."""

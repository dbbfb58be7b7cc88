"""The BLIP-2 model: checkpoints, the two half-models, attention, prefix tree, LoRA, merging, device and memory."""

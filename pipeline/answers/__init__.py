"""Answer generation, prediction on new images, and VQA accuracy."""

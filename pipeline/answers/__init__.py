"""Generated answers, their scores, and VQA accuracy."""

"""The small BLIP-2 checkpoint in this package, created by `pipeline.blip2.embedded.pretrain`."""

from pathlib import Path

EMBEDDED = "embedded"
"""Value of `model.checkpoint` for it."""


def embedded_checkpoint() -> Path:
    """Return the folder of the embedded checkpoint, in Hugging Face format."""
    return Path(__file__).parent / "checkpoint"

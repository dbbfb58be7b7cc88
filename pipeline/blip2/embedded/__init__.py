"""The small BLIP-2 inside this package, made by `pipeline.blip2.embedded.pretrain`."""

from pathlib import Path

EMBEDDED = "embedded"  # what a config calls it


def embedded_checkpoint() -> Path:
    """Its folder, in Hugging Face form."""
    return Path(__file__).parent / "checkpoint"

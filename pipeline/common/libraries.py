"""Import of libraries that are slow to load, or print more than a user needs."""


def import_bitsandbytes() -> None:
    """Import bitsandbytes without `torch.compile`, which takes a quarter of the time that a command needs to start.

    At import, bitsandbytes compiles two functions that neither the CPU nor the CUDA backend calls. If that fails, it
    keeps them uncompiled, but the attempt alone loads the whole compiler. Call this function before importing PEFT,
    which imports bitsandbytes itself.
    """
    from unittest.mock import patch

    from pipeline.common.compat import silence_optional_kernel_warning

    silence_optional_kernel_warning()
    with patch("torch.compile", side_effect=RuntimeError):
        import bitsandbytes  # noqa: F401


def hide_transformers_progress() -> None:
    """Disable the progress bars of transformers, which would interrupt those of the pipeline."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

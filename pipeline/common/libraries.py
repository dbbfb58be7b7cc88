"""Settings of libraries that print more than a user needs."""


def hide_transformers_progress() -> None:
    """Disable the progress bars of transformers, which would interrupt those of the pipeline."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

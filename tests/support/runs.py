"""Helpers for training runs."""

from pathlib import Path

from pipeline.config import Config


def with_train(config: Config, **settings: object) -> Config:
    """Return `config` with other settings in its `train` section."""
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in `folder` by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

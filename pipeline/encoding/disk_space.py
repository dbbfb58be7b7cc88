"""Check the disk space that a cache needs."""

import shutil
from pathlib import Path

from cache.estimate import WriteEstimate
from pipeline.common.errors import PipelineError
from pipeline.config import CacheConfig


def check_disk_space(estimate: WriteEstimate, config: CacheConfig) -> None:
    """Raise `PipelineError` if the disk cannot hold what a run will write."""
    free = free_disk_bytes(config.dir)
    if estimate.bytes_needed > free:
        missing = estimate.wanted - estimate.stored
        smaller = ", or set cache.dtype=float16" if config.dtype == "float32" else ""
        raise PipelineError(
            f"{config.dir}: {missing} images and the text need {format_bytes(estimate.bytes_needed)}, but only "
            f"{format_bytes(free)} are free. Free disk space, or choose another cache.dir{smaller}. Nothing was changed"
        )


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, which may not exist yet."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def format_bytes(count: int) -> str:
    """Format a size in MB or GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"

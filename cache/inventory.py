"""Caches as files in folders: which there are, what is in them, and their removal."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.format import PART_NAME
from cache.lock import LOCK_NAME, FolderLock, exclude_readers
from cache.manifest import MANIFEST_NAME, Manifest, unlisted_parts
from cache.ownership import holds_cache, own_files
from cache.spec import CacheError


@dataclass(frozen=True)
class CacheFolder:
    """What can be said of a cache without opening its parts."""

    folder: Path
    manifest: Manifest | None
    """None if it is unfinished."""
    sealed: int
    """Parts that are full, and with `in_progress` all that are planned."""
    in_progress: int
    bytes: int
    """On disk; a part in work takes less than its length."""
    other_files: list[str]
    """Names in the folder that are not a cache's."""
    unlisted: list[str]
    """Names of parts that a finished cache does not know."""


def describe(folder: Path) -> CacheFolder:
    """Raises CacheError if there is no cache in `folder`, or its manifest is not sound."""
    if not holds_cache(folder):
        raise CacheError(f"{folder}: no cache is there; `pipe cache ls` looks for those below a folder")
    own = own_files(folder)
    parts = [match for path in own if (match := PART_NAME.fullmatch(path.name))]
    in_progress = sum(match[2] is not None for match in parts)
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
    unlisted: list[Path] = []
    with suppress(CacheError):  # the plan is damaged: who goes on with it will say so
        unlisted = unlisted_parts(folder, manifest) if manifest else []
    return CacheFolder(
        folder=folder,
        manifest=manifest,
        sealed=len(parts) - in_progress,
        in_progress=in_progress,
        bytes=_bytes_on_disk(own),
        other_files=sorted(path.name for path in folder.iterdir() if path not in own),
        unlisted=[path.name for path in unlisted],
    )


def _bytes_on_disk(paths: list[Path]) -> int:
    """Without those that have got another name meanwhile, from a process that writes the cache."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def find_caches(root: Path) -> list[Path]:
    """Folders of caches, finished or not, at `root` and below."""
    return sorted(path for folder, _, _ in os.walk(root) if holds_cache(path := Path(folder)))


def remove(folder: Path) -> int:
    """Deletes a cache, its own files only, and the folder if nothing else is in it; -> bytes freed.

    The manifest goes first, so that a cache half deleted is never taken for a whole one. Raises CacheError if no
    cache is there or another process is writing or reading it, OSError.
    """
    if folder.is_symlink():
        raise CacheError(f"{folder}: is a link to {folder.resolve()}: name that folder itself; nothing was deleted")
    if not holds_cache(folder):
        raise CacheError(f"{folder}: no cache is there; nothing was deleted")
    freed = _bytes_on_disk(own_files(folder))
    lock = FolderLock(folder)
    try:
        with exclude_readers(folder, "remove"):
            for path in sorted(own_files(folder), key=_removal):
                path.unlink(missing_ok=True)
    finally:
        lock.release()
    if not any(folder.iterdir()):
        folder.rmdir()
    return freed


def _removal(path: Path) -> int:
    """When a file is removed: the parts after all that they make known as a cache's, at the end the lock."""
    if path.name == MANIFEST_NAME:
        return 0
    return 3 if path.name == LOCK_NAME else 2 if path.name.startswith("features-") else 1

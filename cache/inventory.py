"""Caches as files in folders: which there are, what is in them, and their removal."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.format import PART_NAME
from cache.lock import LOCK_NAME, FolderLock
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, unlisted_parts
from cache.spec import CacheError
from cache.writer import OWN_NAME


@dataclass(frozen=True)
class CacheFolder:
    """What can be said of a cache without opening its parts."""

    folder: Path
    manifest: Manifest | None
    """None if it is unfinished."""
    sealed: int
    """Parts that are full, and with `in_work` all that are planned."""
    in_work: int
    bytes: int
    """On disk; a part in work takes less than its length."""
    foreign: list[str]
    """Names in the folder that are not a cache's."""
    unlisted: list[str]
    """Names of parts that a finished cache does not know."""


def describe(folder: Path) -> CacheFolder:
    """Raises CacheError if there is no cache in `folder`, or its manifest is not sound."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [path for path in paths if OWN_NAME.fullmatch(path.name)]
    if not any(path.name != LOCK_NAME for path in own):
        raise CacheError(f"{folder}: no cache is there; `pipe cache ls` looks for those below a folder")
    parts = [match for path in own if (match := PART_NAME.fullmatch(path.name))]
    in_work = sum(match[2] is not None for match in parts)
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
    unlisted: list[Path] = []
    with suppress(CacheError):  # the plan is damaged: who goes on with it will say so
        unlisted = unlisted_parts(folder, manifest) if manifest else []
    return CacheFolder(
        folder=folder,
        manifest=manifest,
        sealed=len(parts) - in_work,
        in_work=in_work,
        bytes=sum(path.stat().st_blocks * 512 for path in own),
        foreign=[path.name for path in paths if path not in own],
        unlisted=[path.name for path in unlisted],
    )


def find_caches(root: Path) -> list[Path]:
    """Folders of caches, finished or not, at `root` and below."""
    return sorted(Path(folder) for folder, _, names in os.walk(root) if any(map(_marks_a_cache, names)))


def _marks_a_cache(name: str) -> bool:
    return name in (MANIFEST_NAME, PLAN_NAME) or PART_NAME.fullmatch(name) is not None


def remove(folder: Path) -> int:
    """Deletes a cache, its own files only, and the folder if nothing else is in it; -> bytes freed.

    The manifest goes first, so that a cache half deleted is never taken for a whole one. Raises CacheError if no
    cache is there or another process is writing it, OSError.
    """
    own = [path for path in folder.iterdir() if OWN_NAME.fullmatch(path.name)] if folder.is_dir() else []
    if not any(path.name != LOCK_NAME for path in own):
        raise CacheError(f"{folder}: no cache is there; nothing was deleted")
    freed = sum(path.stat().st_blocks * 512 for path in own)
    lock = FolderLock(folder)
    try:
        for path in sorted(own, key=lambda path: path.name != MANIFEST_NAME):
            path.unlink(missing_ok=True)
    finally:
        lock.release()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
    return freed

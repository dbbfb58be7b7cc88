"""Finding, describing and removing caches."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.format import PART_NAME
from cache.lock import LOCK_NAME, FolderLock, exclude_readers
from cache.manifest import MANIFEST_NAME, Manifest, unlisted_parts
from cache.ownership import holds_cache, own_files
from cache.portability import bytes_on_disk
from cache.spec import CacheError


@dataclass(frozen=True)
class CacheFolder:
    """Description of a cache that needs no part to be opened."""

    folder: Path
    manifest: Manifest | None
    """None if the cache is unfinished."""
    sealed: int
    """Number of sealed parts."""
    in_progress: int
    """Number of parts that are being written; with `sealed` all that are planned."""
    bytes: int
    """Size on disk; an unfinished part occupies less than its length."""
    other_files: list[str]
    """Names in the folder that do not belong to the cache."""
    unlisted: list[str]
    """Names of parts that neither the manifest nor the plan lists."""


def describe(folder: Path) -> CacheFolder:
    """Describe the cache in `folder`. Raises CacheError if there is none or its manifest is damaged."""
    if not holds_cache(folder):
        raise CacheError(f"{folder}: no cache found. List the caches below a folder with `pipe cache ls FOLDER`.")
    own = own_files(folder)
    parts = [match for path in own if (match := PART_NAME.fullmatch(path.name))]
    in_progress = sum(match[2] is not None for match in parts)
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
    unlisted: list[Path] = []
    with suppress(CacheError):  # the plan is damaged: the next writer reports it
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
    """Sum the sizes of the files that still exist: a process that writes the cache may rename them."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += bytes_on_disk(path)
    return total


def find_caches(root: Path) -> list[Path]:
    """Return the folders of caches, finished or not, at `root` and below."""
    return sorted(path for folder, _, _ in os.walk(root) if holds_cache(path := Path(folder)))


def remove(folder: Path) -> int:
    """Delete a cache's own files, and the folder if it is empty then; return the freed bytes.

    The manifest is deleted first, so that a partly deleted cache is never mistaken for a finished one.

    Raises:
        CacheError: There is no cache, or another process is writing or reading it.
        OSError: A file cannot be deleted.
    """
    if folder.is_symlink():
        raise CacheError(f"{folder}: is a link to {folder.resolve()}. Nothing was deleted; name that folder itself.")
    if not holds_cache(folder):
        raise CacheError(f"{folder}: no cache found; nothing was deleted")
    freed = _bytes_on_disk(own_files(folder))
    lock = FolderLock(folder)
    try:
        with exclude_readers(folder, "remove"):
            for path in sorted(own_files(folder), key=_removal_order):
                if path.name != LOCK_NAME:
                    path.unlink(missing_ok=True)
        lock.remove()
    finally:
        lock.release()
    if not any(folder.iterdir()):
        folder.rmdir()
    return freed


def _removal_order(path: Path) -> int:
    """Return the sort key for removal: the parts identify the cache's other files, so they are removed last."""
    if path.name == MANIFEST_NAME:
        return 0
    return 2 if PART_NAME.match(path.name) else 1

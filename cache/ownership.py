"""Which files in a folder belong to a cache. Only these are ever deleted."""

import re
from contextlib import suppress
from pathlib import Path

from cache.files import TEMPORARY, sha256_of
from cache.format import PART_NAME
from cache.lock import LOCK_NAME
from cache.manifest import (
    ATTACHMENT_FILE,
    ATTACHMENT_TEMPORARY,
    MANIFEST_NAME,
    PLAN_NAME,
    TEXT_NAME,
    Manifest,
    attachment_file,
    is_cache_json,
)
from cache.spec import CacheError

_PART = re.compile(rf"{PART_NAME.pattern}({re.escape(TEMPORARY)})?")
_UNMISTAKABLE_NAME = re.compile(
    rf"{_PART.pattern}|(text-.+|thumbnails-\d+)\.h5{re.escape(TEMPORARY)}|"
    + "|".join(map(re.escape, (LOCK_NAME, ATTACHMENT_TEMPORARY, MANIFEST_NAME + TEMPORARY, PLAN_NAME + TEMPORARY)))
)


def holds_cache(folder: Path) -> bool:
    """Return whether there is a cache, finished or not: a part, or a manifest or plan. Raises OSError."""
    try:
        return _has_parts(folder) or any(is_cache_json(folder / name) for name in (MANIFEST_NAME, PLAN_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_usable(folder: Path) -> None:
    """Raise CacheError if `folder` is neither absent, nor an empty folder, nor a cache."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: not a folder. Choose another `cache.dir`.")
    if not folder.exists() or holds_cache(folder):
        return
    own = own_files(folder)  # e.g. the lock file of a run that was killed at its start
    if other := sorted(path.name for path in folder.iterdir() if path not in own):
        raise CacheError(f"{folder}: contains other files ({other[0]}, ...), no cache. Choose another `cache.dir`.")


def own_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that belong to a cache, sorted by name. Raises OSError.

    A user's file may be named like a text or an attachment. These belong to the cache only if the manifest lists them,
    or, after a kill, if their name contains the first digits of their own SHA-256.
    """
    listed: set[str] = set()
    with suppress(CacheError):
        listed = listed_files(Manifest.load(folder))
    has_parts = _has_parts(folder)
    return [path for path in sorted(folder.iterdir()) if path.name in listed or _is_own(path, has_parts)]


def listed_files(manifest: Manifest) -> set[str]:
    """Return the names of all files of a finished cache except the manifest."""
    texts = {text.file for text in manifest.splits.values()}
    attachments = {attachment_file(name, sha256) for name, sha256 in manifest.attachments.items()}
    return {part.file for part in manifest.parts} | texts | attachments


def _has_parts(folder: Path) -> bool:
    return any(_PART.fullmatch(path.name) for path in folder.iterdir())


def _is_own(path: Path, has_parts: bool) -> bool:
    if path.name in (MANIFEST_NAME, PLAN_NAME):
        return has_parts or is_cache_json(path)  # beside parts even a damaged one
    if TEXT_NAME.fullmatch(path.name) or ATTACHMENT_FILE.fullmatch(path.name):
        with suppress(OSError):
            return path.is_file() and sha256_of(path).startswith(path.stem[-12:])
        return False
    return _UNMISTAKABLE_NAME.fullmatch(path.name) is not None

"""Which files in a folder are a cache's own: they alone are ever deleted, and all others are somebody's work."""

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
_NAMED_LIKE_NO_OTHER = re.compile(
    rf"{_PART.pattern}|(text-.+|thumbnails-\d+)\.h5{re.escape(TEMPORARY)}|"
    + "|".join(map(re.escape, (LOCK_NAME, ATTACHMENT_TEMPORARY, MANIFEST_NAME + TEMPORARY, PLAN_NAME + TEMPORARY)))
)


def holds_cache(folder: Path) -> bool:
    """Whether there is a cache, finished or not: a part, or a manifest or plan of this format. Raises OSError."""
    try:
        return _has_parts(folder) or any(is_cache_json(folder / name) for name in (MANIFEST_NAME, PLAN_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return False


def own_files(folder: Path) -> list[Path]:
    """The files in `folder` that a cache has written, by name. Raises OSError.

    Texts and attachments may have a user's file's name: the manifest lists them, or, if a kill left them, their name
    holds the first digits of the SHA-256 of what is in them.
    """
    listed: set[str] = set()
    with suppress(CacheError):
        listed = listed_files(Manifest.load(folder))
    whole = _has_parts(folder)
    return [path for path in sorted(folder.iterdir()) if path.name in listed or _is_own(path, whole)]


def listed_files(manifest: Manifest) -> set[str]:
    """The names of all files that a finished cache consists of, but the manifest's own."""
    texts = {text.file for text in manifest.splits.values()}
    attachments = {attachment_file(name, sha256) for name, sha256 in manifest.attachments.items()}
    return {part.file for part in manifest.parts} | texts | attachments


def _has_parts(folder: Path) -> bool:
    return any(_PART.fullmatch(path.name) for path in folder.iterdir())


def _is_own(path: Path, beside_parts: bool) -> bool:
    if path.name in (MANIFEST_NAME, PLAN_NAME):
        return beside_parts or is_cache_json(path)  # a damaged one is known by the parts
    if TEXT_NAME.fullmatch(path.name) or ATTACHMENT_FILE.fullmatch(path.name):
        with suppress(OSError):
            return path.is_file() and sha256_of(path).startswith(path.stem[-12:])
        return False
    return _NAMED_LIKE_NO_OTHER.fullmatch(path.name) is not None

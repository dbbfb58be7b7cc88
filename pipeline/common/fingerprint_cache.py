"""Cache of the fingerprints of large files, valid until a file changes."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from cache.files import write_atomically

RACY_SECONDS = 2
"""A file that changed this recently may change again without a new timestamp."""


def file_states(paths: Sequence[Path]) -> str | None:
    """Return a key that changes with the files, or None if one of them changed within the last seconds.

    The kernel sets the ctime of a file at every change, and programs cannot reset it. A clock that is set back, or a
    file system without ctime, can still hide a change: the key saves time, it is not a proof.
    """
    states = []
    for path in paths:
        found = path.stat()
        if time.time() - found.st_ctime < RACY_SECONDS:
            return None
        states.append(
            [str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        )
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def recall(key: str | None) -> str | None:
    """Return the fingerprint stored under `key`, if any."""
    if key is None:
        return None
    try:
        digest = (_folder() / key).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: no home folder
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def remember(key: str | None, digest: str) -> str:
    """Store `digest` under `key` if the folder is writable, and return it."""
    if key is not None:
        try:
            _folder().mkdir(parents=True, exist_ok=True)
            write_atomically(_folder() / key, digest.encode())
        except (OSError, RuntimeError):
            pass  # it will be computed again
    return digest


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2-vqa-pipeline" / "fingerprints"

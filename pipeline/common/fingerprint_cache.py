"""Digests of large files, remembered for as long as the files stay as they are."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from cache.files import write_atomically

RACY_SECONDS = 2  # a file changed as shortly ago may change again within the same tick of its clock


def file_states(paths: Sequence[Path]) -> str | None:
    """A key that changes with the files; None if one changed a moment ago.

    The kernel sets a file's ctime at every change, and programs cannot set it back. A clock that is set back, or a
    file system that keeps no ctime, may still hide a change: this saves time, and is no proof.
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
    """The digest remembered under `key`, if any."""
    if key is None:
        return None
    try:
        digest = (_folder() / key).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def remember(key: str | None, digest: str) -> str:
    """Remembers `digest`, where a folder can be written for that; -> `digest`."""
    if key is not None:
        try:
            _folder().mkdir(parents=True, exist_ok=True)
            write_atomically(_folder() / key, digest.encode())
        except (OSError, RuntimeError):
            pass  # only the time to find it again is lost
    return digest


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2-vqa-pipeline" / "fingerprints"

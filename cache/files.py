"""Durable file writes: after a kill or power loss either the old file or the new one is there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cache import portability
from cache.portability import fsync_folder as fsync_folder

TEMPORARY = ".tmp"
"""Suffix of a file that is being written."""
_BLOCK = 1 << 20


@contextmanager
def open_descriptor(path: Path, flags: int) -> Iterator[int]:
    """Open a file and close it at the end of the context. Raises OSError."""
    descriptor = os.open(path, flags | portability.BINARY, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder, durably. An existing `target` is replaced atomically."""
    source.replace(target)
    fsync_folder(target.parent)


def temporary_path(path: Path) -> Path:
    """Return the path at which `path` is written before it gets its name."""
    return path.with_name(path.name + TEMPORARY)


def write_atomically(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace the file at `path` by `data`, written to `temporary` first.

    Raises OSError; then `temporary` is removed and the file at `path` is unchanged.
    """
    temporary = temporary or temporary_path(path)
    try:
        with open_descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            pwrite_all(descriptor, data, 0)
            os.fsync(descriptor)
        rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """Return an array's memory as bytes, copied only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` in bytes. Raises OSError; then a prefix of it may be written."""
    view = memoryview(data)
    while view:
        written = portability.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def pread_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fill `data` from `offset` in bytes. Raises OSError, also if the file ends too early."""
    while data:
        read = portability.pread_into(descriptor, data, offset)
        if read == 0:
            raise OSError(f"file ends at byte {offset}, {len(data)} bytes too early")
        data, offset = data[read:], offset + read


def sha256_of(path: Path, length: int | None = None) -> str:
    """Return the SHA-256 (hex) of the first `length` bytes of a file, by default of all. Raises OSError."""
    digest = hashlib.sha256()
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        left = os.fstat(descriptor).st_size if length is None else length
        while left and (block := os.read(descriptor, min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    if left:
        raise OSError(f"file ends {left} bytes too early")
    return digest.hexdigest()

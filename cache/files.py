"""Bytes to disk so that a kill or a power cut at any moment leaves either the old file or the new one."""

import ctypes
import hashlib
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY = ".tmp"
_BLOCK = 1 << 20


@contextmanager
def open_descriptor(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor of `path`, closed at the end. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: those just created, renamed or removed."""
    with open_descriptor(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames within one folder, durably; an existing `target` is replaced in one step."""
    source.replace(target)
    fsync_folder(target.parent)


def temporary_path(path: Path) -> Path:
    """Where `path` is built before it gets its name."""
    return path.with_name(path.name + TEMPORARY)


def write_atomically(path: Path, data: bytes, building: Path | None = None) -> None:
    """Replaces the file at `path` by `data`, in one step; until then it is `building`.

    Raises OSError; then `building` is gone, and what was at `path` is still there.
    """
    building = building or temporary_path(path)
    try:
        with open_descriptor(building, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            pwrite_all(descriptor, data, 0)
            os.fsync(descriptor)
        rename(building, path)
    except BaseException:
        with suppress(OSError):
            building.unlink()
        raise


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The memory of an array, byte by byte; a copy only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset` bytes. Raises OSError; then any first part of it may be written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def begin_flush(descriptor: int, offset: int, size: int) -> None:
    """Has the kernel begin to bring what was just written to disk, and goes on: a later flush waits for less."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def pread_into(descriptor: int, data: memoryview, offset: int) -> None:
    """Fills `data` from `offset` bytes on. Raises OSError, also where the file ends too early."""
    while data:
        read = os.preadv(descriptor, [data], offset)
        if read == 0:
            raise OSError(f"file ends at byte {offset}, {len(data)} bytes too early")
        data, offset = data[read:], offset + read


def sha256_of(path: Path, length: int | None = None) -> str:
    """SHA-256 (hex) of the first `length` bytes of a file, of all by default. Raises OSError."""
    digest = hashlib.sha256()
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        left = os.fstat(descriptor).st_size if length is None else length
        while left and (block := os.read(descriptor, min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    if left:
        raise OSError(f"file ends {left} bytes too early")
    return digest.hexdigest()


def map_file(path: Path, offset: int, size: int) -> np.ndarray[Any, Any]:
    """(size,) uint8, read only: a map of a file from `offset` bytes on. Raises OSError.

    By libc, since Python's own mmap keeps the file open, and a process may have no more than some hundred.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + size
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        if os.fstat(descriptor).st_size < offset + size:
            raise OSError(f"file ends before byte {offset + size}")
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address in (None, _MAP_FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    mapped = (ctypes.c_uint8 * length).from_address(address)
    weakref.finalize(mapped, _libc.munmap, address, length).atexit = False
    array = np.ctypeslib.as_array(mapped)[offset - start :]
    array.flags.writeable = False
    return array


_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

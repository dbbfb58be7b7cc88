"""System calls that some platforms lack, each with a fallback: the only module that names them."""

import ctypes
import os
import re
import socket
import sys
from contextlib import suppress
from errno import EBADF, EINVAL, ENOLCK, ENOSYS, EOPNOTSUPP
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import lock_descriptor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BINARY = getattr(os, "O_BINARY", 0)
"""Flag of `os.open` that keeps Windows from translating line ends."""
DONT_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""Flags of `os.open` that open a pipe or terminal without waiting; regular files are unaffected."""
CAN_RENAME_OPEN_FILES = os.name != "nt"
MAPS_KEEP_FILES_OPEN = os.name == "nt" or sys.version_info < (3, 13)

_NO_LOCKS = (ENOSYS, ENOLCK, EOPNOTSUPP, EINVAL, EBADF)
_DEFAULT_MAX_OPEN_FILES = 512
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_position = Lock()  # held while a fallback moves a descriptor's position


def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at `offset` in bytes; return the number of bytes written. Raises OSError."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def pread_into(descriptor: int, data: memoryview, offset: int) -> int:
    """Read up to `len(data)` bytes from `offset` into `data`; return the number of bytes read. Raises OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [data], offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(data))
    data[: len(found)] = found
    return len(found)


def map_file(descriptor: int) -> mmap:
    """Return a read-only memory map of a whole file, valid after the descriptor is closed. Raises OSError."""
    options: dict[str, Any] = {} if MAPS_KEEP_FILES_OPEN else {"trackfd": False}
    return mmap(descriptor, 0, access=ACCESS_READ, **options)


def fdatasync(descriptor: int) -> None:
    """Flush a file's data, and its metadata where the two cannot be separated. Raises OSError."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Does nothing where folders cannot be opened. Raises OSError."""
    descriptor = open_folder(folder)
    if descriptor is not None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_folder(folder: Path) -> int | None:
    """Return a descriptor of a folder, or None where folders cannot be opened. Raises OSError."""
    if os.name == "nt":
        return None
    return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def begin_flush(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to start writing a range to disk, so that a later flush waits less."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file, on every platform; return False if it is held elsewhere.

    The lock ends when the descriptor is closed, at the latest with the process. On Windows other processes cannot
    read the first byte meanwhile. A file system without locks counts as locked. Raises OSError.
    """
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        return _is_without_locks(error)


def try_flock(descriptor: int, shared: bool = False) -> bool:
    """Take an advisory lock on an open file or folder; return False if a conflicting lock is held elsewhere.

    Like `try_lock`, but it may be shared, and where `fcntl` is missing nothing is locked. Raises OSError.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        return _is_without_locks(error)


def _is_without_locks(error: OSError) -> bool:
    if error.errno not in _NO_LOCKS:
        raise error
    return True


def describe_flock_holders(descriptor: int) -> str:
    """Return which processes of this machine hold an advisory lock on the file, for messages; only Linux lists them."""
    processes: set[int] = set()
    with suppress(OSError, AttributeError):
        found = os.fstat(descriptor)
        file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        rows = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        processes = {int(row[4]) for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == file}
    known = [str(process) for process in sorted(processes) if process > 0]
    return f"process {', '.join(known)} on {socket.gethostname()}" if known else "another process"


def bytes_on_disk(path: Path) -> int:
    """Return the bytes that a file occupies, which for a sparse file are fewer than its length. Raises OSError."""
    found = path.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def max_open_files() -> int:
    """Return how many files this process may have open."""
    if resource is None:
        return _DEFAULT_MAX_OPEN_FILES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _DEFAULT_MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else limit


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process since its start or since its reset; None if unknown."""
    with suppress(OSError):
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_resident_bytes() -> None:
    """Restart the count of `peak_resident_bytes`, where the platform can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def set_malloc_mmap_threshold(size: int) -> None:
    """Have glibc return freed blocks of at least `size` bytes to the system; other C libraries are unaffected."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def trim_malloc() -> None:
    """Have glibc return its free memory to the system; other C libraries are unaffected."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)

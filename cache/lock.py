"""Who may write: one process at a time, known by name, and never one that is dead; and who reads meanwhile."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from cache.spec import CacheError

LOCK_NAME = ".lock"
LOCK_TIMEOUT_SECONDS = 10  # seconds
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_NONE = -1  # no descriptor


class FolderLock:
    """Holds `folder` for writing until `release`, at the latest when the process ends, however it ends.

    Waits for `LOCK_TIMEOUT_SECONDS` first. The lock is the kernel's, on the file `.lock`, which names its holder while
    it is held and is empty otherwise; a file system without locks is used without. Raises CacheError that says who
    holds the folder, OSError.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = _open_locked(folder / LOCK_NAME)
        try:
            self._sign()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        if self._descriptor is not None:
            try:
                with suppress(OSError):  # the name of the holder stays, and nobody is held up by it
                    os.ftruncate(self._descriptor, 0)
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _sign(self) -> None:
        assert self._descriptor is not None
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        owner = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since})
        with suppress(OSError):  # on a full disk a cache must still be removable
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, owner.encode(), 0)


class ReadLock:
    """Keeps the cache in `folder` from being removed or repaired until `release`; it may be written meanwhile.

    The lock is the kernel's, a shared one on the folder itself: nothing is written, so that a cache on a read-only disk
    is held as well. A file system without locks is used without. Raises CacheError if the cache is being removed.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = _NONE
        with suppress(OSError):  # who reads a folder that cannot be read says so
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._descriptor != _NONE and not lock(self._descriptor, LOCK_TIMEOUT_SECONDS, fcntl.LOCK_SH):
            self.release()
            raise CacheError(f"{folder}: another process is removing or repairing this cache. Run the command again.")

    def release(self) -> None:
        if self._descriptor != _NONE:
            os.close(self._descriptor)
            self._descriptor = _NONE

    def __del__(self) -> None:
        self.release()


@contextmanager
def exclude_readers(folder: Path, doing: str) -> Iterator[None]:
    """Keeps readers away. Raises CacheError that says who is reading the cache, and that `doing` must wait; OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock(descriptor):
            raise CacheError(
                f"{folder}: {_readers(descriptor)} is reading this cache, in a training or an evaluation: {doing} it "
                "when that has ended. Nothing was changed."
            )
        yield
    finally:
        os.close(descriptor)


def _readers(descriptor: int) -> str:
    """The processes of this machine that hold a lock on the file, in words."""
    found = os.fstat(descriptor)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    processes: list[str] = []
    with suppress(OSError):  # Linux alone has this list
        rows = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        processes = [row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == place]
    known = sorted({process for process in processes if int(process) > 0}, key=int)
    return f"process {', '.join(known)} on {socket.gethostname()}" if known else "another process"


def _open_locked(path: Path) -> int:
    """The lock file, locked: the one that is there then, since who removes a cache removes its lock as well."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not lock(descriptor, LOCK_TIMEOUT_SECONDS):
                raise CacheError(_held(path.parent))
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_not_locked(folder: Path) -> None:
    """Raises CacheError if another process is writing the cache in `folder`: to be said before long preparations."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # nobody has begun there; or it cannot be written, which its writer will say
    try:
        if not lock(descriptor, LOCK_TIMEOUT_SECONDS):
            raise CacheError(_held(folder))
    finally:
        os.close(descriptor)


def lock(descriptor: int, patience: float = 0, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes the kernel's lock on an open file; False if another process keeps it for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return True


def _held(folder: Path) -> str:
    return f"{folder}: {describe_holder(folder)} is writing this cache. Run the command again when it is done."


def describe_holder(folder: Path) -> str:
    """Who holds the folder, in words."""
    try:
        owner = json.loads((folder / LOCK_NAME).read_bytes())
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

"""Locks on a folder: one writer at a time, known by name, and any number of readers."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from cache import portability
from cache.files import open_descriptor, pwrite_all
from cache.portability import describe_flock_holders, try_flock, try_lock
from cache.spec import CacheError

LOCK_NAME = ".lock"
LOCK_TIMEOUT_SECONDS = 10
_POLL_SECONDS = 0.2


class FolderLock:
    """Exclusive lock on a folder for writing, held until `release` or the end of the process.

    Locks the file `.lock`, which names its holder while locked and is empty otherwise. On a file system without locks
    nothing is locked.

    Raises:
        CacheError: Another process has held the lock for `LOCK_TIMEOUT_SECONDS`; the message names it.
        OSError: The lock file cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        """Lock `folder`."""
        self._path = folder / LOCK_NAME
        self._descriptor: int | None = _open_locked(self._path)
        try:
            self._write_holder()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._descriptor is not None:
            try:
                with suppress(OSError):  # a holder's name without a lock blocks nobody
                    os.ftruncate(self._descriptor, 0)
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def remove(self) -> None:
        """Remove the lock file, and release the lock. Raises OSError."""
        if portability.CAN_RENAME_OPEN_FILES:  # so that nobody can lock the file before it is gone
            self._path.unlink(missing_ok=True)
            self.release()
        else:
            self.release()
            self._path.unlink(missing_ok=True)

    def _write_holder(self) -> None:
        assert self._descriptor is not None
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since})
        with suppress(OSError):  # a cache must be removable from a full disk
            os.ftruncate(self._descriptor, 0)
            pwrite_all(self._descriptor, f" {holder}".encode(), 0)  # on Windows the first byte is locked


class ReadLock:
    """Shared lock on a folder: a cache cannot be removed or repaired until `release`, but it can be extended.

    Locks the folder itself and writes nothing, so it works on a read-only disk. Without `flock` nothing is locked.

    Raises:
        CacheError: The cache is being removed or repaired.
    """

    def __init__(self, folder: Path) -> None:
        """Lock `folder`; nothing happens if it cannot be opened."""
        self._descriptor: int | None = None
        with suppress(OSError):  # the caller's own access reports it
            self._descriptor = portability.open_folder(folder)
        descriptor = self._descriptor
        if descriptor is not None and not _wait_for(lambda: try_flock(descriptor, shared=True)):
            self.release()
            raise CacheError(f"{folder}: another process is removing or repairing this cache. Run the command again.")

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        """Release the lock."""
        self.release()


@contextmanager
def exclude_readers(folder: Path, action: str) -> Iterator[None]:
    """Keep readers out of a cache during the context.

    Raises:
        CacheError: The cache is being read; the message names the processes and the `action` to repeat.
        OSError: The folder cannot be opened.
    """
    descriptor = portability.open_folder(folder)
    try:
        if descriptor is not None and not try_flock(descriptor):
            raise CacheError(
                f"{folder}: {describe_flock_holders(descriptor)} is reading this cache for training or evaluation. "
                f"Nothing was changed; {action} the cache when that process has finished."
            )
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_not_locked(folder: Path) -> None:
    """Raise CacheError if another process is writing in `folder`, to report it before long preparations."""
    try:
        with open_descriptor(folder / LOCK_NAME, os.O_RDWR) as descriptor:
            if not _wait_for(lambda: try_lock(descriptor)):
                raise CacheError(_locked_message(folder))
    except OSError:
        return  # no lock file, or none that can be written: the writer's own error is better


def describe_holder(folder: Path) -> str:
    """Return who holds the lock on a folder, for messages."""
    try:
        with (folder / LOCK_NAME).open("rb", buffering=0) as file:
            file.seek(1)  # on Windows the first byte is locked
            holder = json.loads(file.read())
        return f"process {holder['process']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _open_locked(path: Path) -> int:
    """Return a locked descriptor of the lock file that is at `path` now: removing a cache removes its lock file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | portability.BINARY, 0o666)
        try:
            if not _wait_for(lambda descriptor=descriptor: try_lock(descriptor)):  # type: ignore[misc]
                raise CacheError(_locked_message(path.parent))
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait_for(attempt: Callable[[], bool]) -> bool:
    """Repeat `attempt` until it succeeds; return False if it has not after `LOCK_TIMEOUT_SECONDS`."""
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while not attempt():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _locked_message(folder: Path) -> str:
    return f"{folder}: {describe_holder(folder)} is writing this cache. Run the command again when it has finished."

"""Writes files and folders atomically, with errors that name the file, the cause and the remedy."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from cache.files import fsync_folder, open_descriptor, write_atomically
from pipeline.common.errors import PipelineError

_MAKE_WRITABLE = "Make it writable for your user"
_CHECK_DISK = "Check the disk"
_REMEDIES = {
    errno.ENOSPC: "Free space on the disk",
    errno.EDQUOT: "Free space within your quota",
    errno.EFBIG: "Choose a disk that allows larger files",
    errno.EROFS: _MAKE_WRITABLE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.ENOTDIR: "It must be a folder: choose another path",
    errno.EISDIR: "It must be a file: choose another path",
    errno.EEXIST: "It exists already: choose another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Check that the folder still exists",
    errno.EIO: _CHECK_DISK,
    errno.ESTALE: _CHECK_DISK,
    errno.ENXIO: _CHECK_DISK,
    errno.ENODEV: _CHECK_DISK,
}
"""Remedy for each errno of a disk error."""
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error")
_FULL_DISK_BYTES = 1 << 20
"""A disk with less free space counts as full."""
_PROBE = bytes(4096)


class WriteError(PipelineError):
    """A file could not be written.

    Args:
        path: the file or folder.
        number: errno of the error.
        then: what to do after its cause is removed.
    """

    def __init__(self, path: Path, number: int, then: str = "run the same command again") -> None:
        self.path, self.number = path, number
        super().__init__(f"{path}: {os.strerror(number)}. {_REMEDIES[number]}, then {then}")

    def followed_by(self, then: str) -> "WriteError":
        """Return the error with another next step."""
        return WriteError(self.path, self.number, then)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert disk errors, which libraries raise as different exceptions, into `WriteError`.

    Args:
        path: the file, or a folder in which files are written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = disk_errno(error, path)
        if number is None:
            raise
        named = getattr(error, "filename", None)
        raise WriteError(Path(named) if isinstance(named, str) and path.is_dir() else path, number) from error


@contextmanager
def followed_by(then: str) -> Iterator[None]:
    """Set the next step of a `WriteError` that is raised in the block."""
    try:
        yield
    except WriteError as error:
        raise error.followed_by(then) from error


def disk_errno(error: Exception, path: Path) -> int | None:
    """Return the errno of a disk error, or None for other errors. torch drops the errno: free space decides."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found and int(found[1]) in _REMEDIES else None
    if _TORCH_WRITER.search(str(error)):
        return errno.ENOSPC if shutil.disk_usage(_nearest_existing(path)).free < _FULL_DISK_BYTES else errno.EIO
    return None


def disk_problem(error: BaseException) -> str | None:
    """Return the message for an unexpected error of a full or read-only disk, or None for other errors."""
    number = disk_errno(error, Path()) if isinstance(error, Exception) else None
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {os.strerror(number)}. {_REMEDIES[number]} (for temporary files, see TMPDIR), then try again"


def require_writable(folder: Path) -> None:
    """Check before long work that a file can be written to `folder`, or to its nearest existing parent.

    Raises:
        WriteError: it cannot.
    """
    existing = _nearest_existing(folder)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with TemporaryFile(dir=existing, buffering=0) as file:
            file.write(_PROBE)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise WriteError(folder, error.errno) from error


def require_utf8(folder: Path) -> None:
    """Check that safetensors can open files in `folder`: it supports UTF-8 paths only.

    Raises:
        PipelineError: the path is not UTF-8.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise PipelineError(f"{folder}: its path is not UTF-8, which safetensors requires; rename it") from None


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` atomically.

    Characters of file names that are not UTF-8 are escaped such that JSON and YAML read them back.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(path):
        write_atomically(path, text.encode("utf-8", "backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Append a whole line to the file at `path`, or nothing.

    Raises:
        WriteError: the file cannot be written.
    """
    data = memoryview((line + "\n").encode())
    with writing(path), open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise


def sync_files(folder: Path) -> None:
    """Flush the files in `folder`, and their names, to disk."""
    for path in folder.rglob("*"):
        with open_descriptor(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
    fsync_folder(folder)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Provide an empty folder that replaces `folder` at the end of the block, or is removed on an error."""
    partial = folder.with_name(folder.name + ".partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        try:
            partial.mkdir(parents=True)
            yield partial
            sync_files(partial)
            put_in_place(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put_in_place(source: Path, folder: Path) -> None:
    """Rename the folder `source` to `folder`. An existing `folder` is removed after the rename."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # left by a rename that failed and could not be undone
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        source.rename(folder)
    except OSError:
        with suppress(OSError):
            if old.exists():
                old.rename(folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or its nearest existing parent."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())

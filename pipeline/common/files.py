"""Writing a run's files: each is there whole or not at all, and an error says which file, why and what to do."""

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

_MAKE_WRITABLE = "Make it writable for you"
_CHECK_DISK = "Check the disk"
_REMEDIES = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room within your quota",
    errno.EFBIG: "Choose a disk that takes larger files",
    errno.EROFS: _MAKE_WRITABLE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.ENOTDIR: "A folder is needed there: choose another place",
    errno.EISDIR: "A file is needed there: choose another place",
    errno.EEXIST: "Something else has this name: choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Check that the folder is still there",
    errno.EIO: _CHECK_DISK,
    errno.ESTALE: _CHECK_DISK,
    errno.ENXIO: _CHECK_DISK,
    errno.ENODEV: _CHECK_DISK,
}
"""What to do about an error of a disk."""
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error")
_FULL_BYTES = 1 << 20  # so little is free that the disk counts as full
_PROBE = bytes(4096)


class WriteError(PipelineError):
    """A file could not be written."""

    def __init__(self, path: Path, number: int, then: str = "run the same command again") -> None:
        """`number` is the errno, `then` what to do once its cause is gone."""
        self.path, self.number = path, number
        super().__init__(f"{path}: {os.strerror(number)}. {_REMEDIES[number]}, then {then}")

    def followed_by(self, then: str) -> "WriteError":
        return WriteError(self.path, self.number, then)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a disk, however a library raises them, into a `WriteError`.

    `path` is the file, or a folder in which several are written.
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
    """Have a `WriteError` say what to do next."""
    try:
        yield
    except WriteError as error:
        raise error.followed_by(then) from error


def disk_errno(error: Exception, path: Path) -> int | None:
    """The errno of a disk's error; None if it is another error. torch keeps no errno: the room that is left tells."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _REMEDIES else None
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found and int(found[1]) in _REMEDIES else None
    if _TORCH_WRITER.search(str(error)):
        return errno.ENOSPC if shutil.disk_usage(_nearest(path)).free < _FULL_BYTES else errno.EIO
    return None


def disk_problem(error: BaseException) -> str | None:
    """Of an error that no stage expected: that the disk takes nothing, and what to do; None if it is another error."""
    number = disk_errno(error, Path()) if isinstance(error, Exception) else None
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {os.strerror(number)}. {_REMEDIES[number]} (that of temporary files is TMPDIR's), then try again"


def require_writable(folder: Path) -> None:
    """Raise `WriteError` if `folder`, or the nearest one above it that is there, takes no file: before long work."""
    existing = _nearest(folder)
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
    """Raise `PipelineError` for a folder that weights cannot be written to, or read from, because of its name."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise PipelineError(f"{folder}: its path is not UTF-8, and safetensors takes no other; rename it") from None


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step. Raises `WriteError`.

    A file name that is no UTF-8 is escaped, as JSON and YAML read it back.
    """
    with writing(path):
        write_atomically(path, text.encode("utf-8", "backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Add a line to the file at `path`, or nothing. Raises `WriteError`."""
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
    """Bring the files in `folder`, and their names, to disk."""
    for path in folder.rglob("*"):
        with open_descriptor(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
    fsync_folder(folder)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end, and goes if anything fails."""
    partial = folder.with_name(folder.name + ".partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir(parents=True)
            yield partial
            sync_files(partial)
            put_in_place(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put_in_place(source: Path, folder: Path) -> None:
    """Rename the folder `source` to `folder`; one that was there before goes when the new one has its name."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # a disk that took no rename did not take that back either
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


def _nearest(path: Path) -> Path:
    """`path`, or the nearest above it that is there."""
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())

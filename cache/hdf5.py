"""HDF5 files of plain, contiguous arrays: laid out by h5py, filled by `pwrite`, checked before they are trusted."""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cache.files import as_bytes, open_descriptor, pwrite_all
from cache.spec import CacheError, DamagedFileError, FileError, UnreadableError

PAGE = 4096
"""Alignment of the arrays in a file, in bytes."""
REPAIR_ADVICE = "Run `pipe cache repair`, or delete the file and run `pipe precompute` again to redo its contents."

_SYSTEM_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT
}  # fmt: skip

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, str | int]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def write_arrays(path: Path, arrays: Mapping[str, Array], attributes: Attributes) -> None:
    """Write numeric arrays and attributes to a new HDF5 file, durably. Raises CacheError, OSError."""
    create_file(path, {name: (array.shape, array.dtype) for name, array in arrays.items()}, arrays, attributes)


def read_arrays(path: Path) -> tuple[dict[str, Array], dict[str, str | int]]:
    """Return the arrays and attributes that `write_arrays` wrote. Raises FileError if the file is not sound."""
    with open_file(path) as file:
        arrays = {name: dataset[()] for name, dataset in plain_datasets(file).items()}
        return arrays, read_attributes(file)


def create_file(path: Path, shapes: Shapes, arrays: Mapping[str, Array], attributes: Attributes) -> None:
    """Create a file with a data set per shape, filled with the arrays that are given, durably.

    Raises CacheError, OSError.
    """
    offsets = _lay_out(path, shapes, attributes)
    with open_descriptor(path, os.O_RDWR) as descriptor:
        for name, array in arrays.items():
            if array.size:
                pwrite_all(descriptor, as_bytes(array), offsets[name])
        os.fsync(descriptor)


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Open an h5py.File for reading. Every error, also in the context, is raised as a FileError."""
    try:
        check_regular_file(path)
        with h5py.File(path, "r", locking=False) as file:  # HDF5's own locks would block an unfinished part
            yield file
    except FileError:
        raise
    except CacheError as error:
        raise DamagedFileError(path, str(error), REPAIR_ADVICE) from error
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        number = _errno_of(error)
        if number in _SYSTEM_ERRORS:
            cause = OSError(number, os.strerror(number))
            raise read_error(path, cause) from cause
        problem = f"cannot be read: {os.strerror(number)}" if number else "is not a sound HDF5 file"
        raise DamagedFileError(path, problem, REPAIR_ADVICE) from error


def check_regular_file(path: Path) -> None:
    """Raise CacheError if `path` is a link, a pipe or a device; OSError if it cannot be read."""
    if not stat.S_ISREG(path.lstat().st_mode):
        problem = "is a link or no regular file: refused, a cache must not point elsewhere"
        raise DamagedFileError(path, problem, REPAIR_ADVICE)


def read_error(path: Path, error: OSError) -> FileError:
    """Return the CacheError to raise from `error`. An error without a number means that the file ends too early."""
    if isinstance(error, FileNotFoundError):
        return DamagedFileError(path, "is missing", "Run `pipe precompute` again to redo its contents.")
    if not error.errno:
        return DamagedFileError(path, f"cannot be read: {error}", REPAIR_ADVICE)
    return UnreadableError(path, f"cannot be read: {error.strerror}", "Check that its disk is mounted.")


def read_attributes(file: Any) -> dict[str, str | int]:
    """Return the attributes of the root group. Raises CacheError for one that is neither string nor integer."""
    attributes: dict[str, str | int] = {}
    for name, value in file.attrs.items():
        if isinstance(value, np.integer):
            value = int(value)
        if not isinstance(value, str | int):
            raise CacheError(f"attribute {name} is {value!r}, must be a string or an integer")
        attributes[name] = value
    return attributes


def plain_datasets(file: Any) -> dict[str, Any]:
    """Return the data sets of the root group. Raises CacheError unless all are plain bytes inside this file."""
    if file.userblock_size:
        raise CacheError("has an HDF5 user block, which a cache file never has")
    for name in file:
        link = file.get(name, getlink=True)
        if type(link) is not h5py.HardLink:
            raise CacheError(f"{name} is a {type(link).__name__}: refused, a cache file must not point elsewhere")
    return {name: _plain_dataset(name, file[name], Path(file.filename).stat().st_size) for name in file}


def _plain_dataset(name: str, dataset: Any, file_size: int) -> Any:
    if not isinstance(dataset, h5py.Dataset):
        raise CacheError(f"{name} is a {type(dataset).__name__}, must be a data set")
    creation = dataset.id.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        raise CacheError(f"{name} is a virtual data set: refused, a cache file must not point elsewhere")
    if creation.get_external_count():
        raise CacheError(f"{name} has external storage: refused, a cache file must not point elsewhere")
    if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_nfilters():
        raise CacheError(f"{name} is chunked, compact or filtered, must be contiguous")
    if dataset.dtype.kind not in "iuf" or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        raise CacheError(f"{name} is of type {dataset.dtype}, must be plain numbers")
    offset = dataset.id.get_offset()
    if dataset.size and (offset is None or offset + dataset.nbytes > file_size):
        raise CacheError(f"{name} exceeds the file of {file_size} bytes: the file was truncated")
    return dataset


def _lay_out(path: Path, shapes: Shapes, attributes: Attributes) -> dict[str, int]:
    """Create the file with all data sets allocated but not written; return the offset of each in bytes."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with h5py.File(_new_file(path)) as file:
            file.attrs.update(attributes)
            for name, (shape, dtype) in shapes.items():
                file.create_dataset(name, shape=shape, dtype=dtype, dcpl=creation, track_times=False)
            return {name: file[name].id.get_offset() for name in shapes}
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        if number := _errno_of(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise CacheError(f"{path}: HDF5 could not create the file: {error}") from error


def _new_file(path: Path) -> Any:
    """Return the identifier of a new file, its data aligned to pages.

    The low-level API is needed to leave out the root group's times, which HDF5 1.14 writes and 2.0 does not: the
    bytes depend neither on the library's version nor on the clock.
    """
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    access.set_alignment(1, PAGE)
    access.set_file_locking(True, True)  # "best-effort": no lock where the file system has none
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    return h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)


def _errno_of(error: Exception) -> int | None:
    """Return the errno of an HDF5 error, which may be in its text only."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else None

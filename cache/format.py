"""The bytes of the cache's HDF5 files: laid out and checked by h5py, filled by `pwrite`. See FORMAT.md."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cache.files import as_bytes, open_descriptor, pread_into, pwrite_all, sha256_of
from cache.spec import CacheError, CacheSpec, DamagedFileError, FileError, UnreadableError

PAGE = 4096
DIGEST_BYTES = 32
NOT_WRITTEN = -1
FAILED = -2
PART_NAME = re.compile(r"features-(\d{5,})\.h5(\.partial)?")

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, str | int]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True, eq=False)
class PartLayout:
    """Where things are in one part that was found to be sound, and which rows are written."""

    path: Path
    spec: CacheSpec
    rows: int
    crc_offset: int
    """Where `crc32` begins, in bytes. All else before the features is written once, when the part is created."""
    features_offset: int
    """Where the rows begin, in bytes, up to the end of the file; row i is at i times `spec.row_bytes` from there."""
    digests: Array
    """(rows, 32) uint8: SHA-256 of the image file of each row, also of those not written."""
    crc32: Array
    """(rows,) int64: CRC-32 of each row's bytes; -1: not written yet; -2: not written, its image has no features."""


def part_name(index: int, sealed: bool = True) -> str:
    """File name of part `index`, counted from 0."""
    return f"features-{index:05d}.h5" + ("" if sealed else ".partial")


def create_part(path: Path, spec: CacheSpec, digests: Array) -> None:
    """Creates a part for the images `digests` (rows, 32) uint8, without any row written, and brings it to disk.

    Raises CacheError, OSError.
    """
    rows = len(digests)
    arrays = {"image_digest": digests, "crc32": np.full(rows, NOT_WRITTEN, "<i8")}
    _create(path, _part_shapes(spec, rows), arrays, spec.to_attributes())


def inspect_part(path: Path) -> PartLayout:
    """Opens a part, sealed or not, and checks all that reading it by offset relies on.

    Raises CacheError if it does not open, is not laid out as FORMAT.md says, or lacks bytes.
    """
    with _reading(path) as file:
        spec = CacheSpec.from_attributes(_attributes(file))
        datasets = _plain_datasets(file)
        if set(datasets) != set(_part_shapes(spec, 1)):
            raise CacheError(f"holds the data sets {sorted(datasets)}, not those of a part")
        rows = int(datasets["crc32"].size)
        for name, (shape, dtype) in _part_shapes(spec, rows).items():
            found = datasets[name]
            if rows < 1 or found.shape != shape or found.dtype != dtype:
                raise CacheError(f"{name} is {found.shape} {found.dtype}, must be {shape} {dtype} with rows >= 1")
        _check_order(datasets, path.stat().st_size)
        return PartLayout(
            path=path,
            spec=spec,
            rows=rows,
            crc_offset=datasets["crc32"].id.get_offset(),
            features_offset=datasets["query_features"].id.get_offset(),
            digests=datasets["image_digest"][()],
            crc32=datasets["crc32"][()],
        )


def check_head(path: Path, length: int | None, sha256: str, size: int | None = None) -> None:
    """Checks a file's size, if it is known, and the SHA-256 of its first `length` bytes, or of all.

    To be called before HDF5 opens the file: it may crash on a broken one. Raises CacheError.
    """
    try:
        check_regular_file(path)
        found = path.stat().st_size
        if size is not None and found != size:
            problem = f"has {found} bytes, must have {size}: it was cut short or changed"
            raise DamagedFileError(path, problem, _ADVICE)
        if sha256_of(path, length) != sha256:
            problem = ("" if length is None else f"its head of {length} bytes ") + "is not what was written"
            raise DamagedFileError(path, problem, _ADVICE)
    except OSError as error:
        raise read_error(path, error) from error


def check_regular_file(path: Path) -> None:
    """Raises CacheError for a link, a pipe or a device in a file's place, OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        problem = "is a link or no regular file: refused, a cache must not point elsewhere"
        raise DamagedFileError(path, problem, _ADVICE)


def read_error(path: Path, error: OSError) -> FileError:
    """What to raise from `error`; one without a number is not the system's: the file ends too early."""
    if isinstance(error, FileNotFoundError):
        return DamagedFileError(path, "is missing", "Run `pipe precompute` again: what was in it is made anew.")
    if not error.errno:
        return DamagedFileError(path, f"cannot be read: {error}", _ADVICE)
    return UnreadableError(path, f"cannot be read: {error.strerror}", "Is its disk still there?")


def head_sha256(path: Path, head_bytes: int, crc_offset: int, rows: int) -> str:
    """SHA-256 (hex) of a part's head without its `crc32`: of all that does not change while it is in work.

    Raises OSError.
    """
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        head = bytearray(min(head_bytes, os.fstat(descriptor).st_size))
        pread_into(descriptor, memoryview(head), 0)
    del head[crc_offset : crc_offset + rows * 8]
    return hashlib.sha256(head).hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, Array], attributes: Attributes) -> None:
    """Writes arrays of numbers and attributes to an HDF5 file, and the file to disk. Raises CacheError, OSError."""
    _create(path, {name: (array.shape, array.dtype) for name, array in arrays.items()}, arrays, attributes)


def read_arrays(path: Path) -> tuple[dict[str, Array], dict[str, str | int]]:
    """The inverse of `write_arrays`. Raises CacheError as `inspect_part` does."""
    with _reading(path) as file:
        arrays = {name: dataset[()] for name, dataset in _plain_datasets(file).items()}
        return arrays, _attributes(file)


def _part_shapes(spec: CacheSpec, rows: int) -> Shapes:
    """The data sets of a part, in the order in which they lie in the file."""
    return {
        "image_digest": ((rows, DIGEST_BYTES), np.dtype(np.uint8)),
        "crc32": ((rows,), np.dtype("<i8")),
        "query_features": ((rows, spec.query_tokens, spec.width), spec.storage_dtype),
    }


def _check_order(datasets: Mapping[str, Any], file_size: int) -> None:
    """The head, then the features up to the file's end: so one digest of the head covers all but the features."""
    position = 0
    for name in ("image_digest", "crc32", "query_features"):
        offset = datasets[name].id.get_offset()
        if offset < position:
            raise CacheError(f"{name} begins at byte {offset}, must come after byte {position}")
        position = offset + datasets[name].nbytes
    if position != file_size:
        raise CacheError(f"has {file_size} bytes, must end with its features at byte {position}")


def _create(path: Path, shapes: Shapes, arrays: Mapping[str, Array], attributes: Attributes) -> None:
    offsets = _lay_out(path, shapes, attributes)
    with open_descriptor(path, os.O_RDWR) as descriptor:
        for name, array in arrays.items():
            if array.size:
                pwrite_all(descriptor, as_bytes(array), offsets[name])
        os.fsync(descriptor)


def _lay_out(path: Path, shapes: Shapes, attributes: Attributes) -> dict[str, int]:
    """Creates the file with room for every data set; -> the offset of each, in bytes. No number is written by HDF5."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        with h5py.File(_new_file(path)) as file:
            file.attrs.update(attributes)
            for name, (shape, dtype) in shapes.items():
                file.create_dataset(name, shape=shape, dtype=dtype, dcpl=plan, track_times=False)
            return {name: file[name].id.get_offset() for name in shapes}
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        if number := _errno_in(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise CacheError(f"{path}: HDF5 could not create the file: {error}") from error


def _new_file(path: Path) -> Any:
    """The identifier of a new file, its data aligned to pages.

    `h5py.File` cannot be told to leave out the root group's times, which HDF5 1.14 writes and 2.0 does not: the bytes
    depend neither on the library's version nor on the clock.
    """
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    access.set_alignment(1, PAGE)
    access.set_file_locking(True, True)  # without where the file system has none: "best-effort"
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    return h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)


_ADVICE = "Run `pipe cache repair`, or delete it and run `pipe precompute` again: only what was in it is made anew."


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """An h5py.File to look into; whatever is wrong with it comes out as a FileError."""
    try:
        check_regular_file(path)
        with h5py.File(path, "r", locking=False) as file:  # the locks are `lock`'s: HDF5's would bar a part in work
            yield file
    except FileError:
        raise
    except CacheError as error:
        raise DamagedFileError(path, str(error), _ADVICE) from error
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        number = _errno_in(error)
        if number in _NOT_THE_FILES_FAULT:
            cause = OSError(number, os.strerror(number))
            raise read_error(path, cause) from cause
        problem = f"cannot be read: {os.strerror(number)}" if number else "is not a sound HDF5 file"
        raise DamagedFileError(path, problem, _ADVICE) from error


_NOT_THE_FILES_FAULT = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT
}  # fmt: skip


def _errno_in(error: Exception) -> int | None:
    """Of what the system refuses HDF5 tells in three lines, in any of them."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else None


def _attributes(file: Any) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {}
    for name, value in file.attrs.items():
        if isinstance(value, np.integer):
            value = int(value)
        if not isinstance(value, str | int):
            raise CacheError(f"attribute {name} is {value!r}, neither text nor a whole number")
        attributes[name] = value
    return attributes


def _plain_datasets(file: Any) -> dict[str, Any]:
    """The data sets at the root, each found to be plain bytes inside this very file."""
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
    plan = dataset.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        raise CacheError(f"{name} is a virtual data set: refused, a cache file must not point elsewhere")
    if plan.get_external_count():
        raise CacheError(f"{name} has external storage: refused, a cache file must not point elsewhere")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_nfilters():
        raise CacheError(f"{name} is chunked, compact or filtered, must be contiguous")
    if dataset.dtype.kind not in "iuf" or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        raise CacheError(f"{name} is of type {dataset.dtype}, must be plain numbers")
    offset = dataset.id.get_offset()
    if dataset.size and (offset is None or offset + dataset.nbytes > file_size):
        raise CacheError(f"{name} is not wholly inside the file of {file_size} bytes: it was cut short")
    return dataset

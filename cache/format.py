"""The layout of a part, one of the HDF5 files that hold features. See FORMAT.md."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.files import open_descriptor, pread_into, sha256_of
from cache.hdf5 import (
    REPAIR_ADVICE,
    Array,
    Shapes,
    check_regular_file,
    create_file,
    open_file,
    plain_datasets,
    read_attributes,
    read_error,
)
from cache.spec import CacheError, CacheSpec, DamagedFileError

DIGEST_BYTES = 32
NOT_WRITTEN = -1
"""`crc32` of a row that is not written yet."""
FAILED = -2
"""`crc32` of a row whose image has no features."""
PART_NAME = re.compile(r"features-(\d{5,})\.h5(\.partial)?")


@dataclass(frozen=True, eq=False)
class PartLayout:
    """Offsets and rows of one part whose structure was checked."""

    path: Path
    spec: CacheSpec
    rows: int
    crc_offset: int
    """Offset of `crc32` in bytes. Everything else before the features is written once, at creation."""
    features_offset: int
    """Offset of the features in bytes, which extend to the end of the file; row i is `i * spec.row_bytes` further."""
    digests: Array
    """(rows, 32) uint8: SHA-256 of the image file of each row, whether written or not."""
    crc32: Array
    """(rows,) int64: CRC-32 of each row's bytes, or `NOT_WRITTEN` or `FAILED`."""


def part_name(index: int, sealed: bool = True) -> str:
    """Return the file name of part `index`, counted from 0."""
    return f"features-{index:05d}.h5" + ("" if sealed else ".partial")


def sealed_name(path: Path) -> str:
    """Return the file name that a part has once it is sealed."""
    return path.name.removesuffix(".partial")


def create_part(path: Path, spec: CacheSpec, digests: Array) -> None:
    """Create a part for the images `digests` (rows, 32) uint8, with no row written, durably.

    Raises CacheError, OSError.
    """
    rows = len(digests)
    arrays = {"image_digest": digests, "crc32": np.full(rows, NOT_WRITTEN, "<i8")}
    create_file(path, _part_shapes(spec, rows), arrays, spec.to_attributes())


def inspect_part(path: Path) -> PartLayout:
    """Return the layout of a part, sealed or not, after checking all that reading by offset relies on.

    Raises:
        FileError: The file cannot be opened, is not laid out as FORMAT.md specifies, or is truncated.
    """
    with open_file(path) as file:
        spec = CacheSpec.from_attributes(read_attributes(file))
        datasets = plain_datasets(file)
        if set(datasets) != set(_part_shapes(spec, 1)):
            raise CacheError(f"has the data sets {sorted(datasets)}, not those of a part")
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
    """Check a file's size, if given, and the SHA-256 of its first `length` bytes, or of all.

    Call this before HDF5 opens the file, since HDF5 may crash on a damaged one.

    Raises:
        FileError: The file is damaged or cannot be read.
    """
    try:
        check_regular_file(path)
        found = path.stat().st_size
        if size is not None and found != size:
            raise DamagedFileError(path, f"has {found} bytes, must have {size}", REPAIR_ADVICE)
        if sha256_of(path, length) != sha256:
            part = "" if length is None else f"its head of {length} bytes "
            raise DamagedFileError(path, f"{part}is damaged (SHA-256 mismatch)", REPAIR_ADVICE)
    except OSError as error:
        raise read_error(path, error) from error


def head_sha256(path: Path, head_bytes: int, crc_offset: int, rows: int) -> str:
    """Return the SHA-256 (hex) of a part's head without its `crc32`, which does not change while rows are written.

    Raises OSError.
    """
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        head = bytearray(min(head_bytes, os.fstat(descriptor).st_size))
        pread_into(descriptor, memoryview(head), 0)
    del head[crc_offset : crc_offset + rows * 8]
    return hashlib.sha256(head).hexdigest()


def _part_shapes(spec: CacheSpec, rows: int) -> Shapes:
    """Return the data sets of a part, in their order in the file."""
    return {
        "image_digest": ((rows, DIGEST_BYTES), np.dtype(np.uint8)),
        "crc32": ((rows,), np.dtype("<i8")),
        "query_features": ((rows, spec.query_tokens, spec.width), spec.storage_dtype),
    }


def _check_order(datasets: Mapping[str, Any], file_size: int) -> None:
    """Check that the features come last and end the file, so that one digest covers everything else."""
    position = 0
    for name in ("image_digest", "crc32", "query_features"):
        offset = datasets[name].id.get_offset()
        if offset < position:
            raise CacheError(f"{name} begins at byte {offset}, must come after byte {position}")
        position = offset + datasets[name].nbytes
    if position != file_size:
        raise CacheError(f"has {file_size} bytes, must end with its features at byte {position}")

"""Writer of one unfinished part: rows and their CRCs, in an order that makes a kill harmless."""

import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache import portability
from cache.files import as_bytes, pwrite_all, rename
from cache.format import FAILED, NOT_WRITTEN, inspect_part
from cache.spec import CacheError, CacheSpec

COMMIT_SECONDS = 2.0
COMMIT_BYTES = 256 << 20

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # all bits set: infinite or NaN

Array = np.ndarray[Any, Any]


class PartWriter:
    """Writer of one `.partial` part, which bypasses HDF5 so that a kill cannot damage the file's structure.

    Rows are flushed to disk before their CRCs are written, every few seconds; a kill loses at most the rows since
    then. One process at a time can write a part.

    Raises:
        CacheError: The part is damaged, another process is writing it, or a write fails.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock the part at `path`."""
        self._descriptor: int | None = _open_locked(path)
        try:
            self.layout = inspect_part(path)
        except BaseException:
            self._close_file()
            raise
        self.path, self.spec = path, self.layout.spec
        self.digests, self.crc32 = self.layout.digests, self.layout.crc32
        self._uncommitted: list[tuple[int, Array]] = []
        self._uncommitted_bytes = 0
        self._committed_at = time.monotonic()
        self._checksums = ThreadPoolExecutor(1, "checksums")

    def __enter__(self) -> "PartWriter":
        """Return this writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close this writer."""
        self.close()

    @property
    def unwritten_rows(self) -> Array:
        """Rows that are neither written nor marked as failed."""
        return np.flatnonzero(self.crc32 == NOT_WRITTEN)

    def unwritten_batches(self, size: int) -> list[range]:
        """Return the batches of `size` rows, counted from the part's first row, that have an unwritten row.

        The grid is fixed because the rounding of a row depends on the batch it is encoded in.
        """
        batches = (range(start, min(start + size, self.layout.rows)) for start in range(0, self.layout.rows, size))
        return [rows for rows in batches if (self.crc32[rows.start : rows.stop] == NOT_WRITTEN).any()]

    def write(self, rows: Array, features: Array) -> None:
        """Store features (n, Q, D), in the spec's storage type, as `rows` (n,), which are ascending and unwritten.

        Raises:
            CacheError: The features have another shape or type, or are not finite; then none is stored.
        """
        self._check(rows, features)
        with _disk_errors(self.path):
            for start, stop in _runs(rows):
                block = as_bytes(features[start:stop])
                first, row_bytes = int(rows[start]), self.spec.row_bytes
                checksums = self._checksums.submit(_crc32_of_rows, block, row_bytes)  # while the kernel copies
                offset = self.layout.features_offset + first * row_bytes
                pwrite_all(self._open_descriptor(), block, offset)
                portability.begin_flush(self._open_descriptor(), offset, len(block))
                self._add_uncommitted(first, checksums.result(), len(block))

    def mark_failed(self, rows: Array) -> None:
        """Mark unwritten `rows` whose images have no features."""
        with _disk_errors(self.path):
            for row in rows.tolist():
                self._add_uncommitted(row, np.array([FAILED], "<i8"), 0)

    def commit(self) -> None:
        """Make all rows written so far durable."""
        if not self._uncommitted:
            return
        flushed, self._uncommitted = self._uncommitted, []  # cleared first: a failed flush may have dropped the rows
        with _disk_errors(self.path):
            portability.fdatasync(self._open_descriptor())  # a CRC may reach the disk only after its row
            for first, checksums in flushed:
                pwrite_all(self._open_descriptor(), as_bytes(checksums), self.layout.crc_offset + first * 8)
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()

    def seal(self) -> None:
        """Rename the part to its final name, or remove it if it has no row; unwritten rows stay unwritten."""
        self.commit()
        with _disk_errors(self.path):
            os.fsync(self._open_descriptor())
            if not portability.CAN_RENAME_OPEN_FILES:
                self._close_file()
            if (self.crc32 >= 0).any():
                rename(self.path, self.path.with_suffix(""))
            else:
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Commit, and close the file. A second call does nothing."""
        try:
            if self._descriptor is not None:
                self.commit()
        finally:
            self._checksums.shutdown()
            self._close_file()

    def _open_descriptor(self) -> int:
        assert self._descriptor is not None, "the part is closed"
        return self._descriptor

    def _close_file(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _add_uncommitted(self, first: int, checksums: Array, size: int) -> None:
        self.crc32[first : first + len(checksums)] = checksums
        self._uncommitted.append((first, checksums))
        self._uncommitted_bytes += size
        if self._uncommitted_bytes >= COMMIT_BYTES or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def _check(self, rows: Array, features: Array) -> None:
        assert (self.crc32[rows] == NOT_WRITTEN).all(), "rows are written once"
        shape = (len(rows), self.spec.query_tokens, self.spec.width)
        if features.shape != shape or features.dtype != self.spec.storage_dtype:
            found = f"{features.shape} {features.dtype}"
            raise CacheError(f"features are {found}, must be {shape} {self.spec.storage_dtype} (for {self.spec.dtype})")
        bad = np.flatnonzero(~finite(features, self.spec))
        if bad.size:
            digest = self.digests[rows[bad[0]]].tobytes().hex()
            raise CacheError(f"features of the image with SHA-256 {digest} are not finite in {self.spec.dtype}")


def finite(features: Array, spec: CacheSpec) -> Array:
    """Return for each row of stored features (n, Q, D) whether all its numbers are finite: (n,) bool."""
    bits = np.ascontiguousarray(features).view(f"<u{spec.storage_dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENT[spec.dtype])
    result: Array = ((bits & exponent) != exponent).all(axis=(1, 2))
    return result


def _open_locked(path: Path) -> int:
    """Return a descriptor of a part that no other process can write until it is closed."""
    with _disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | portability.BINARY)
    if not portability.try_flock(descriptor):
        os.close(descriptor)
        raise CacheError(f"{path}: another process is writing this part. Run the command again when it has finished.")
    return descriptor


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Convert OSError to a CacheError that names the file and the next step."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path}: {error.strerror or error}. Completed work is saved. Fix the cause and run the same command again."
        ) from error


def _crc32_of_rows(block: memoryview, row_bytes: int) -> Array:
    return np.array([zlib.crc32(block[i : i + row_bytes]) for i in range(0, len(block), row_bytes)], "<i8")


def _runs(rows: Array) -> Iterator[tuple[int, int]]:
    """Return (start, stop) of each run of consecutive numbers in `rows`."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return ((start, stop) for start, stop in pairwise(edges) if stop > start)

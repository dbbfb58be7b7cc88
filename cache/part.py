"""One part in work: rows and their CRCs, written so that no kill can hurt what is there."""

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

from cache.files import as_bytes, begin_flush, pwrite_all, rename
from cache.format import FAILED, NOT_WRITTEN, inspect_part
from cache.lock import lock
from cache.spec import CacheError, CacheSpec

COMMIT_SECONDS = 2.0
COMMIT_BYTES = 256 << 20
_CLOSED = -1

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}  # all set: infinite or not a number

Array = np.ndarray[Any, Any]


class PartWriter:
    """Fills one `.partial` part with `pwrite`: HDF5 is done with it, so no kill can hurt its structure.

    Data is flushed to disk before the CRCs that vouch for it are written, every few seconds, so that this is what a
    kill can lose. One process at a time works on a part. Raises CacheError if the part is not sound or is being
    written by another process, or if the disk does not take a row.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _open_alone(path)
        try:
            self.layout = inspect_part(path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.path, self.spec = path, self.layout.spec
        self.digests, self.crc32 = self.layout.digests, self.layout.crc32
        self._uncommitted: list[tuple[int, Array]] = []
        self._uncommitted_bytes = 0
        self._committed_at = time.monotonic()
        self._checksums = ThreadPoolExecutor(1, "checksums")

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def unwritten_rows(self) -> Array:
        """Rows that are neither written nor given up."""
        return np.flatnonzero(self.crc32 == NOT_WRITTEN)

    def unwritten_batches(self, size: int) -> list[range]:
        """The batches, of `size` rows counted from the part's first row, in which a row is open.

        Batches lie on this fixed grid because the rounding of a row depends on the batch that it is in.
        """
        every = (range(start, min(start + size, self.layout.rows)) for start in range(0, self.layout.rows, size))
        return [rows for rows in every if (self.crc32[rows.start : rows.stop] == NOT_WRITTEN).any()]

    def write(self, rows: Array, features: Array) -> None:
        """Stores features (n, Q, D), in the spec's storage type, as `rows` (n,), ascending and all open.

        Raises CacheError if the features are of another shape or type or not finite: then none is stored.
        """
        self._check(rows, features)
        with _disk(self.path):
            for start, stop in _runs(rows):
                block = as_bytes(features[start:stop])
                first, size = int(rows[start]), self.spec.row_bytes
                checksums = self._checksums.submit(_crc32_of_rows, block, size)  # while the kernel copies
                offset = self.layout.features_offset + first * size
                pwrite_all(self._descriptor, block, offset)
                begin_flush(self._descriptor, offset, len(block))
                self._promise(first, checksums.result(), len(block))

    def mark_failed(self, rows: Array) -> None:
        """Marks open `rows` whose images have no features; they will not be waited for."""
        with _disk(self.path):
            for row in rows.tolist():
                self._promise(row, np.array([FAILED], "<i8"), 0)

    def commit(self) -> None:
        """Makes all rows so far durable."""
        if not self._uncommitted:
            return
        checked, self._uncommitted = self._uncommitted, []  # after a failure nothing more can be promised of them
        with _disk(self.path):
            os.fdatasync(self._descriptor)  # a CRC on disk is the promise that its row is
            for first, checksums in checked:
                pwrite_all(self._descriptor, as_bytes(checksums), self.layout.crc_offset + first * 8)
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()

    def seal(self) -> None:
        """Gives the part its final name, or removes it if it holds no row; rows still open will never be served."""
        self.commit()
        with _disk(self.path):
            os.fsync(self._descriptor)
            if (self.crc32 >= 0).any():
                rename(self.path, self.path.with_suffix(""))
            else:
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Commits, and lets go of the file; a second call does nothing."""
        if self._descriptor == _CLOSED:
            return
        try:
            self.commit()
        finally:
            self._checksums.shutdown()
            os.close(self._descriptor)
            self._descriptor = _CLOSED

    def _promise(self, first: int, checksums: Array, size: int) -> None:
        self.crc32[first : first + len(checksums)] = checksums
        self._uncommitted.append((first, checksums))
        self._uncommitted_bytes += size
        if self._uncommitted_bytes >= COMMIT_BYTES or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def _check(self, rows: Array, features: Array) -> None:
        assert (self.crc32[rows] == NOT_WRITTEN).all(), "rows are written once"
        wanted = (len(rows), self.spec.query_tokens, self.spec.width)
        if features.shape != wanted or features.dtype != self.spec.storage_dtype:
            found = f"{features.shape} {features.dtype}"
            kind = f"{self.spec.storage_dtype} (for {self.spec.dtype})"
            raise CacheError(f"features are {found}, must be {wanted} {kind}")
        bad = np.flatnonzero(~finite(features, self.spec))
        if bad.size:
            name = self.digests[rows[bad[0]]].tobytes().hex()
            raise CacheError(f"features of image {name} (SHA-256 of its file) are not finite in {self.spec.dtype}")


def _open_alone(path: Path) -> int:
    """A file descriptor of a part that no other process writes until it is closed."""
    with _disk(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if not lock(descriptor):
        os.close(descriptor)
        raise CacheError(f"{path}: another process is writing this part. Run the command again when it is done.")
    return descriptor


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """OSError -> CacheError that says what to do."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path}: {error.strerror or error}. What is written stays good: once that is mended, run the same "
            "command again, and it goes on from here."
        ) from error


def finite(features: Array, spec: CacheSpec) -> Array:
    """(n,) bool: whether all numbers of each row of features (n, Q, D), as stored, are finite."""
    bits = np.ascontiguousarray(features).view(f"<u{spec.storage_dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENT[spec.dtype])
    result: Array = ((bits & exponent) != exponent).all(axis=(1, 2))
    return result


def _crc32_of_rows(block: memoryview, row_bytes: int) -> Array:
    return np.array([zlib.crc32(block[i : i + row_bytes]) for i in range(0, len(block), row_bytes)], "<i8")


def _runs(rows: Array) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of `rows` in which they follow one another."""
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return ((start, stop) for start, stop in pairwise(edges) if stop > start)

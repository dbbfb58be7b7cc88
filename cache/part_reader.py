"""Reading of rows from one part, through a memory map or from its file."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

import numpy as np

from cache import portability
from cache.files import as_bytes, pread_into
from cache.format import PartLayout
from cache.hdf5 import REPAIR_ADVICE, Array, read_error
from cache.spec import CacheError

MAX_MAPPED_PARTS = 4096
"""Number of parts that this process maps, since each map keeps a file open; rows of further parts are read."""


class OpenFile:
    """A file that stays open as long as a thread has this object, also after the cache of files drops it."""

    def __init__(self, path: Path) -> None:
        """Open a file for reading. Raises OSError."""
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | portability.BINARY)

    def __del__(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)


class PartReader:
    """The rows of one checked part, by their number in the cache."""

    def __init__(self, layout: PartLayout, start: int, is_mapped: bool) -> None:
        """Map the part's rows, or read each from its file; row `start` of the cache is its first. Raises OSError."""
        self._path, self._crc32, self._start = layout.path, layout.crc32, start
        self._offset, self._row_bytes = layout.features_offset, layout.spec.row_bytes
        self._features = map_features(layout) if is_mapped else None
        if is_mapped:
            _mapped_parts.add(self)

    def read(self, row: int, out: Array, open_file: Callable[[Path], OpenFile]) -> None:
        """Copy a row to `out` (Q, D). Raises CacheError."""
        row -= self._start
        if self._features is not None:
            out[:] = self._features[row]
            return
        try:
            file = open_file(self._path)
            pread_into(file.descriptor, as_bytes(out), self._offset + row * self._row_bytes)
        except OSError as error:
            raise read_error(self._path, error) from error

    def check(self, row: int, features: Array) -> None:
        """Raise CacheError if the row was never written or `features` do not match its CRC."""
        crc32 = int(self._crc32[row - self._start])
        place = f"{self._path}: row {row - self._start} (row {row} of the cache)"
        if crc32 < 0:
            raise CacheError(f"{place} was never written. Run `pipe precompute` again to encode its image.")
        if zlib.crc32(as_bytes(features)) != crc32:
            raise CacheError(f"{place} is damaged (CRC-32 mismatch). {REPAIR_ADVICE}")


_mapped_parts: WeakSet[PartReader] = WeakSet()


def can_map_part() -> bool:
    """Return whether another part can be mapped: maps take at most half of the files that the process may open."""
    return len(_mapped_parts) < min(MAX_MAPPED_PARTS, portability.max_open_files() // 2)


def map_features(layout: PartLayout) -> Array:
    """Return a part's features (rows, Q, D) as a read-only memory map. Raises OSError."""
    shape = (layout.rows, layout.spec.query_tokens, layout.spec.width)
    try:
        # As a plain array, since indexing a memmap is slower.
        return np.asarray(np.memmap(layout.path, layout.spec.storage_dtype, "r", layout.features_offset, shape))
    except ValueError as error:
        raise OSError(f"file is shorter than its {layout.rows} rows") from error

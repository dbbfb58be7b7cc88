"""Reading of rows from one part, through a memory map or from its file."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

from cache import portability
from cache.files import open_descriptor, pread_into
from cache.format import PartLayout
from cache.hdf5 import REPAIR_ADVICE, read_error
from cache.spec import CacheError

MAX_MAPPED_PARTS = 16384
"""Number of parts that this process maps, a quarter of the maps that Linux allows; rows of further parts are read."""


class OpenFile:
    """A file that stays open as long as a thread has this object, also after the cache of files drops it."""

    def __init__(self, path: str) -> None:
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
        """Map the part, or read each row from its file; row `start` of the cache is its first. Raises OSError."""
        self._path, self._crc32, self._start = str(layout.path), layout.crc32, start
        self._offset, self._row_bytes = layout.features_offset, layout.spec.row_bytes
        self._map = map_file(layout.path) if is_mapped else None
        if is_mapped:
            _mapped_parts.add(self)

    def read(self, row: int, out: memoryview, open_file: Callable[[str], OpenFile]) -> None:
        """Copy the bytes of a row to `out`. Raises CacheError."""
        offset = self._offset + (row - self._start) * self._row_bytes
        if self._map is not None:
            out[:] = self._map[offset : offset + self._row_bytes]
            return
        try:
            file = open_file(self._path)
            pread_into(file.descriptor, out, offset)
        except OSError as error:
            raise read_error(Path(self._path), error) from error

    def check(self, row: int, data: memoryview) -> None:
        """Raise CacheError if the row was never written or its bytes `data` do not match its CRC."""
        crc32 = int(self._crc32[row - self._start])
        place = f"{self._path}: row {row - self._start} (row {row} of the cache)"
        if crc32 < 0:
            raise CacheError(f"{place} was never written. Run `pipe precompute` again to encode its image.")
        if zlib.crc32(data) != crc32:
            raise CacheError(f"{place} is damaged (CRC-32 mismatch). {REPAIR_ADVICE}")


_mapped_parts: WeakSet[PartReader] = WeakSet()


def can_map_part() -> bool:
    """Return whether another part can be mapped. Maps that keep files open get half of the files allowed to be open."""
    limit = MAX_MAPPED_PARTS
    if portability.MAPS_KEEP_FILES_OPEN:
        limit = min(limit, portability.max_open_files() // 2)
    return len(_mapped_parts) < limit


def map_file(path: Path) -> memoryview:
    """Return a read-only memory map of a file, unmapped when it is no longer referenced. Raises OSError."""
    with open_descriptor(path, os.O_RDONLY) as descriptor:
        return memoryview(portability.map_file(descriptor))

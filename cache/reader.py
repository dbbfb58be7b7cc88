"""Reading a finished cache: any rows, at the speed of memory."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from cache.files import as_bytes, map_file, pread_into, sha256_of
from cache.format import PartLayout, check_head, inspect_part, read_error
from cache.lock import ReadLock
from cache.manifest import MANIFEST_NAME, Manifest, PartEntry, attachment_file
from cache.spec import CacheError
from cache.text import TextTable
from cache.thumbnails import Thumbnails, thumbnails_name

MAX_OPEN_FILES = 256
"""Parts that `pread` keeps open; a process may usually have 1024 files."""

Array = np.ndarray[Any, Any]


class FeatureReader:
    """The features and texts of the finished cache in `folder`.

    `io` is "memmap", or "pread": slower, but a mount that vanishes raises CacheError and does not kill the process.
    A part is checked, open_descriptor and mapped when its first row is read, and not carried into other processes by
    pickling: opening costs the same for any number of rows.

    Until `close` the cache is kept from being removed or repaired.

    Raises CacheError if there is no cache, or an unfinished one, or the manifest is not sound or names a file that
    is missing or of another size.
    """

    def __init__(self, folder: Path, io: str = "memmap") -> None:
        if io not in ("memmap", "pread"):
            raise CacheError(f"cache.io is {io!r}, must be memmap or pread")
        self.folder, self.io = Path(folder), io
        self._reading: ReadLock | None = ReadLock(self.folder)
        self.manifest = _load_manifest(self.folder)
        self.spec = self.manifest.spec
        self.rows = self.manifest.rows
        """Number of stored images. Row numbers can be higher: parts may have rows that were never written."""
        self.splits: dict[str, int] = {split: text.questions for split, text in self.manifest.splits.items()}
        """Number of questions of each split."""
        for part in self.manifest.parts:
            _check_size(self.folder, part, self.spec.row_bytes)
        self._ends = np.cumsum([part.rows for part in self.manifest.parts], dtype=np.int64)
        self._forget()

    def __enter__(self) -> "FeatureReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_parts", "_maps", "_opening", "_checked", "_files", "_reading")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reading = None
        self._forget()

    def close(self) -> None:
        """Lets go of maps and files; a later `gather` opens and checks them again."""
        self._forget()
        if self._reading:
            self._reading.release()
            self._reading = None

    def _forget(self) -> None:
        self._parts: dict[int, _OpenPart] = {}
        self._maps: _Maps | None = None
        self._files = lru_cache(MAX_OPEN_FILES)(_File)
        self._opening = Lock()
        self._checked = np.zeros(self._total, bool)  # rows that were read and found good

    def stored(self) -> Iterator[tuple[bytes, int]]:
        """SHA-256 of the image file, and row, of every stored image, in the order of the rows; a part at a time."""
        base = 0
        for index in range(len(self.manifest.parts)):
            layout = self._inspect(index)
            for row in np.flatnonzero(layout.crc32 >= 0).tolist():
                yield layout.digests[row].tobytes(), base + row
            base += layout.rows

    def gather(self, rows: Array, out: Array | None = None) -> Array:
        """Features (n, Q, D), in the storage type (uint16 for bfloat16), of `rows` (n,), whole numbers in any order.

        `out`, contiguous and of that shape and type, is filled and returned if it is given: new memory for every
        call costs more than the reading. A row's CRC is checked the first time that this object reads it, and not
        again: that would take four times as long as the reading, and what the disk loses later shows in a new
        process or in `verify`. Raises CacheError for a row that is out of range, was never written, cannot be
        read, or is not what was written.
        """
        rows = np.asarray(rows, np.int64)
        shape = (len(rows), self.spec.query_tokens, self.spec.width)
        features = np.empty(shape, self.spec.storage_dtype) if out is None else out
        assert (features.shape, features.dtype) == (shape, self.spec.storage_dtype), "out is of another shape or type"
        assert features.flags.c_contiguous, "out has gaps"
        outside = (rows < 0) | (rows >= self._total)
        if outside.any():
            row = int(rows[outside][0])
            raise CacheError(f"{self.folder}: row {row} is not one of {self._total}. {_RENEW}")
        indices = np.searchsorted(self._ends, rows, side="right")
        inside = rows - np.concatenate([[0], self._ends])[indices]
        unchecked = np.flatnonzero(~self._checked[rows]).tolist()
        self._open({int(indices[place]) for place in unchecked})
        if self._maps and len(rows):
            self._maps.gather(indices, inside, features)
        else:
            for place, (index, row) in enumerate(zip(indices.tolist(), inside.tolist(), strict=True)):
                self._parts[index].read(self._files, row, features[place])
        for place in unchecked:
            self._parts[int(indices[place])].check(int(inside[place]), features[place])
            self._checked[rows[place]] = True
        return features

    def text(self, split: str) -> TextTable:
        """The questions of a split. Raises CacheError if there is no such split, or its file is not sound."""
        if split not in self.splits:
            raise CacheError(f"{self.folder}: no split {split!r}; there are: {', '.join(self.splits) or 'none'}")
        entry = self.manifest.splits[split]
        path = self.folder / entry.file
        try:
            sound = sha256_of(path) == entry.sha256
        except OSError as error:
            raise read_error(path, error) from error
        if not sound:
            raise CacheError(f"{path}: is not what was written. {_RENEW}")
        table = TextTable.load(path)
        if len(table) != entry.questions or (len(table) and table.image_row.max() >= self._total):
            raise CacheError(f"{path}: does not belong to {MANIFEST_NAME} beside it. {_RENEW}")
        return table

    def thumbnails(self, rows: Iterable[int]) -> dict[int, bytes]:
        """A small picture file (JPEG, PNG, WebP or GIF) of each of `rows` that has one; older caches have none.

        Raises CacheError if a file of thumbnails is not sound.
        """
        found: dict[int, bytes] = {}
        inside = sorted({row for row in rows if 0 <= row < self._total})
        for index, some in groupby(inside, lambda row: int(np.searchsorted(self._ends, row, side="right"))):
            part = self.manifest.parts[index]
            if (name := thumbnails_name(part.file)) in self.manifest.attachments:
                pictures = Thumbnails.load(self.attachment(name)).images
                start = int(self._ends[index]) - part.rows
                found |= {row: data for row in some if (data := pictures[row - start].tobytes())}
        return found

    def attachment(self, name: str) -> Path:
        """The file of an attachment. Raises CacheError if there is none of that name, or it is not sound."""
        if name not in self.manifest.attachments:
            there = ", ".join(self.manifest.attachments) or "none"
            raise CacheError(f"{self.folder}: no attachment {name!r}; there are: {there}")
        sha256 = self.manifest.attachments[name]
        path = self.folder / attachment_file(name, sha256)
        check_head(path, None, sha256)
        return path

    @property
    def _total(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _inspect(self, index: int) -> PartLayout:
        """The part, after all checks that come before its rows."""
        entry = self.manifest.parts[index]
        path = self.folder / entry.file
        entry.check(self.folder, self.spec.row_bytes)
        layout = inspect_part(path)
        if layout.spec != self.spec:
            lines = "; ".join(layout.spec.diff(self.spec))
            raise CacheError(f"{path}: is not of this cache ({lines}). Delete it and run `pipe precompute` again.")
        if (layout.rows, layout.features_offset) != (entry.rows, entry.head_bytes):
            raise CacheError(f"{path}: is not laid out as {MANIFEST_NAME} says. Run `pipe precompute` again.")
        return layout

    def _open(self, indices: set[int]) -> None:
        if indices <= self._parts.keys():
            return
        with self._opening:  # threads may share a reader
            self._reading = self._reading or ReadLock(self.folder)
            parts = dict(self._parts)
            try:
                for index in sorted(indices - parts.keys()):
                    parts[index] = self._open_one(index)
            finally:
                maps = {index: part.map for index, part in parts.items() if part.map is not None}
                self._maps = _Maps(maps, self.spec.row_bytes) if maps else None
                self._parts = parts  # after the maps: another thread looks here first

    def _open_one(self, index: int) -> "_OpenPart":
        layout = self._inspect(index)
        try:
            return _OpenPart(layout, int(self._ends[index]) - layout.rows, self.io)
        except OSError as error:
            raise read_error(layout.path, error) from error


class _Maps:
    """One array over the maps (rows, Q, D) of parts, by their index, from the lowest address to the highest.

    It is there for `np.take`, which copies rows out of any parts in one call; a loop over the rows in Python takes
    half as long again. What lies between the maps is never touched.
    """

    def __init__(self, maps: dict[int, Array], row_bytes: int) -> None:
        self._maps, self._row_bytes = maps, row_bytes
        addresses = {index: mapped.ctypes.data for index, mapped in maps.items()}
        first = min(addresses, key=addresses.__getitem__)
        end = max(addresses[index] + mapped.nbytes for index, mapped in maps.items())
        self._starts = np.zeros(max(maps) + 1, np.int64)  # where the first row of each part is in the array, in bytes
        self._starts[[*addresses]] = np.array([*addresses.values()]) - addresses[first]
        # The largest items that all places and rows are whole numbers of: pages, of 4096 bytes, or rows if small.
        item = int(np.gcd.reduce([row_bytes, *self._starts.tolist()]))
        items = maps[first].reshape(-1).view(f"V{item}")
        self._array = np.lib.stride_tricks.as_strided(items, ((end - addresses[first]) // item,), writeable=False)

    def gather(self, indices: Array, rows: Array, out: Array) -> None:
        """Copies `rows` (n,) of the parts `indices` (n,) to `out` (n, Q, D)."""
        item = self._array.itemsize
        places = (self._starts[indices] + rows * self._row_bytes) // item
        every = places[:, None] + np.arange(self._row_bytes // item)
        np.take(self._array, every.reshape(-1), out=out.reshape(-1).view(self._array.dtype), mode="clip")


class _File:
    """A file open for reading for as long as somebody has this object: no thread's is closed under its hands."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OpenPart:
    """One part's rows, as a map, or to be read from its file."""

    def __init__(self, layout: PartLayout, start: int, io: str) -> None:
        self._start = start
        """Row of the cache that is this part's first."""
        self._layout = layout
        self.map: Array | None = None
        """(rows, Q, D); None if rows are to be read with `read`."""
        if io == "memmap":
            shape = (layout.rows, layout.spec.query_tokens, layout.spec.width)
            mapped = map_file(layout.path, layout.features_offset, layout.rows * layout.spec.row_bytes)
            self.map = mapped.view(layout.spec.storage_dtype).reshape(shape)

    def read(self, files: Callable[[Path], _File], row: int, out: Array) -> None:
        """Copies a row of the part to `out` (Q, D). Raises CacheError."""
        layout = self._layout
        try:
            file = files(layout.path)
            pread_into(file.descriptor, as_bytes(out), layout.features_offset + row * layout.spec.row_bytes)
        except OSError as error:
            raise read_error(layout.path, error) from error

    def check(self, row: int, features: Array) -> None:
        """Raises CacheError if the row of the part was never written, or `features` are not what was."""
        wanted = int(self._layout.crc32[row])
        place = f"{self._layout.path}: row {row} (row {self._start + row} of the cache)"
        if wanted < 0:
            raise CacheError(f"{place} was never written. Run `pipe precompute` again: it encodes its picture.")
        if zlib.crc32(as_bytes(features)) != wanted:
            raise CacheError(
                f"{place} is not what was written, the file is damaged. Run `pipe cache repair`, or delete the file "
                "and run `pipe precompute` again: its rows are made anew."
            )


_RENEW = "Run `pipe precompute` again: it renews the text."


def _check_size(folder: Path, part: PartEntry, row_bytes: int) -> None:
    path, wanted = folder / part.file, part.size(row_bytes)
    try:
        found = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from error
    if found != wanted:
        raise CacheError(
            f"{path}: has {found} bytes, must have {wanted}: it was cut short or changed. Run `pipe cache repair`, "
            "or delete it and run `pipe precompute` again: what was in it is made anew."
        )


def _load_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise CacheError(f"no cache at {folder}: run `pipe precompute` first, or name its folder with cache.dir=FOLDER")
    if not (folder / MANIFEST_NAME).exists():
        raise CacheError(
            f"{folder}: unfinished cache, it has no {MANIFEST_NAME}: run the same `pipe precompute` command again: "
            "it goes on where it stopped"
        )
    return Manifest.load(folder)

"""Reading a finished cache: any rows, at the speed of memory."""

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache.files import as_bytes, pread_into
from cache.format import NOT_WRITTEN, PartLayout, inspect_part
from cache.manifest import MANIFEST_NAME, Manifest
from cache.spec import CacheError
from cache.text import TextTable

Array = np.ndarray[Any, Any]


class FeatureReader:
    """The features and texts of the finished cache in `folder`.

    `io` is "memmap", or "pread": slower, but a mount that vanishes raises CacheError and does not kill the process.
    Maps and files are opened at their first use and not carried into other processes by pickling.

    Raises CacheError if there is no cache, or an unfinished one, or the manifest or a part is not sound.
    """

    def __init__(self, folder: Path, io: str = "memmap") -> None:
        if io not in ("memmap", "pread"):
            raise CacheError(f"cache.io is {io!r}, must be memmap or pread")
        self.folder, self.io = Path(folder), io
        self._manifest = _load_manifest(self.folder)
        self.spec = self._manifest.spec
        self.provenance = self._manifest.provenance
        self.splits: dict[str, int] = {split: questions for split, (_, questions) in self._manifest.splits.items()}
        """Number of questions of each split."""
        self._parts = [self._inspect(name, rows) for name, rows in self._manifest.parts]
        self._ends = np.cumsum([part.rows for part in self._parts], dtype=np.int64)
        self._crc32 = np.concatenate([np.empty(0, np.int64), *(part.crc32 for part in self._parts)])
        self._checked = np.zeros(len(self._crc32), bool)
        self.rows = int((self._crc32 != NOT_WRITTEN).sum())
        """Number of stored images. Row numbers can be higher: parts may have rows that were never written."""
        self._sources: dict[int, Array | int] = {}

    def __enter__(self) -> "FeatureReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sources": {}}

    def close(self) -> None:
        """Lets go of maps and files; a later `gather` opens them again."""
        for source in self._sources.values():
            if isinstance(source, int):
                os.close(source)
        self._sources = {}

    def digests(self) -> dict[bytes, int]:
        """SHA-256 of the image file -> row, for every stored image, in the order of the rows."""
        every = (digest.tobytes() for part in self._parts for digest in part.digests)
        stored = (self._crc32 != NOT_WRITTEN).tolist()
        return {digest: row for row, (digest, is_stored) in enumerate(zip(every, stored, strict=True)) if is_stored}

    def gather(self, rows: Array) -> Array:
        """Features (n, Q, D), in the storage type (uint16 for bfloat16), of `rows` (n,), whole numbers in any order.

        A row's CRC is checked the first time that it is read. Raises CacheError for a row that is out of range, was
        never written, cannot be read, or is not what was written.
        """
        rows = np.asarray(rows, np.int64)
        self._check_stored(rows)
        features = np.empty((len(rows), self.spec.query_tokens, self.spec.width), self.spec.storage_dtype)
        part_of = np.searchsorted(self._ends, rows, side="right")
        for index in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == index)
            self._read(index, rows[places] - self._start(index), features, places)
        self._check_crc(rows, features)
        return features

    def text(self, split: str) -> TextTable:
        """The questions of a split. Raises CacheError if there is no such split, or its file is not sound."""
        if split not in self.splits:
            raise CacheError(f"{self.folder}: no split {split!r}; there are: {', '.join(self.splits) or 'none'}")
        path = self.folder / self._manifest.splits[split][0]
        table = TextTable.load(path)
        if len(table) != self.splits[split] or not self._stored(table.image_row).all():
            raise CacheError(f"{path}: does not belong to {MANIFEST_NAME} beside it: run `pipe precompute` again")
        return table

    def _inspect(self, name: str, rows: int) -> PartLayout:
        path = self.folder / name
        if not path.is_file():
            raise CacheError(f"{path}: this part is missing. Run `pipe precompute` again: what was in it is made anew.")
        part = inspect_part(path)
        if part.spec != self.spec:
            lines = "; ".join(part.spec.diff(self.spec))
            raise CacheError(f"{path}: is not of this cache ({lines}). Delete it and run `pipe precompute` again.")
        if part.rows != rows:
            raise CacheError(f"{path}: has {part.rows} rows, {MANIFEST_NAME} says {rows}. Run `pipe precompute` again.")
        return part

    def _start(self, index: int) -> int:
        return int(self._ends[index]) - self._parts[index].rows

    def _stored(self, rows: Array) -> Array:
        """(n,) bool: whether each of `rows` (n,) is in range and written."""
        known = (rows >= 0) & (rows < len(self._crc32))
        known[known] = self._crc32[rows[known]] != NOT_WRITTEN
        return known

    def _check_stored(self, rows: Array) -> None:
        stored = self._stored(rows)
        if not stored.all():
            row = int(rows[~stored][0])
            problem = "was never written" if 0 <= row < len(self._crc32) else f"is not one of {len(self._crc32)}"
            raise CacheError(f"{self.folder}: row {row} {problem}. Run `pipe precompute` again: it renews the text.")

    def _read(self, index: int, rows: Array, features: Array, places: Array) -> None:
        """Copies `rows` of part `index` to `places` in features (n, Q, D)."""
        part = self._parts[index]
        try:
            source = self._source(index)
            if isinstance(source, int):
                for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                    pread_into(source, as_bytes(features[place]), part.features_offset + row * self.spec.row_bytes)
            elif len(places) == len(features):
                np.take(source, rows, axis=0, out=features, mode="clip")  # "raise" would go through a buffer
            else:
                for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                    features[place] = source[row]
        except (OSError, ValueError) as error:
            raise CacheError(f"{part.path}: cannot be read any more: {error}. Is its disk still there?") from error

    def _source(self, index: int) -> Array | int:
        """The part's rows: a map (rows, Q, D), or the descriptor of its file."""
        if index not in self._sources:
            part = self._parts[index]
            shape = (part.rows, self.spec.query_tokens, self.spec.width)
            self._sources[index] = (
                os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
                if self.io == "pread"
                else np.asarray(np.memmap(part.path, self.spec.storage_dtype, "r", part.features_offset, shape))
            )
        return self._sources[index]

    def _check_crc(self, rows: Array, features: Array) -> None:
        for place in np.flatnonzero(~self._checked[rows]).tolist():
            row = int(rows[place])
            if zlib.crc32(as_bytes(features[place])) != self._crc32[row]:
                index = int(np.searchsorted(self._ends, row, side="right"))
                place_of_row = f"row {row - self._start(index)} (row {row} of the cache)"
                raise CacheError(
                    f"{self._parts[index].path}: {place_of_row} is not what was written, the file is damaged. "
                    "Delete it and run `pipe precompute` again: its rows are made anew."
                )
            self._checked[row] = True


def _load_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise CacheError(f"no cache at {folder}: run `pipe precompute` first")
    if not (folder / MANIFEST_NAME).exists():
        raise CacheError(
            f"{folder}: unfinished cache, it has no {MANIFEST_NAME}: run the same `pipe precompute` command again: "
            "it goes on where it stopped"
        )
    try:
        return Manifest.load(folder)
    except OSError as error:
        raise CacheError(f"{folder}: {error}") from error

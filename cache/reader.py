"""Reading a finished cache: any rows, at the speed of memory."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache.files import as_bytes, pread_into, sha256_of
from cache.format import PartLayout, check_head, inspect_part
from cache.manifest import MANIFEST_NAME, Manifest, PartEntry, attachment_file
from cache.spec import CacheError
from cache.text import TextTable

Array = np.ndarray[Any, Any]


class FeatureReader:
    """The features and texts of the finished cache in `folder`.

    `io` is "memmap", or "pread": slower, but a mount that vanishes raises CacheError and does not kill the process.
    A part is checked, opened and mapped when its first row is read, and not carried into other processes by
    pickling: opening costs the same for any number of rows.

    Raises CacheError if there is no cache, or an unfinished one, or the manifest is not sound or names a file that
    is missing or of another size.
    """

    def __init__(self, folder: Path, io: str = "memmap") -> None:
        if io not in ("memmap", "pread"):
            raise CacheError(f"cache.io is {io!r}, must be memmap or pread")
        self.folder, self.io = Path(folder), io
        self.manifest = _load_manifest(self.folder)
        self.spec = self.manifest.spec
        self.rows = self.manifest.rows
        """Number of stored images. Row numbers can be higher: parts may have rows that were never written."""
        self.splits: dict[str, int] = {split: text.questions for split, text in self.manifest.splits.items()}
        """Number of questions of each split."""
        for part in self.manifest.parts:
            _check_size(self.folder, part, self.spec.row_bytes)
        self._ends = np.cumsum([part.rows for part in self.manifest.parts], dtype=np.int64)
        self._parts: dict[int, _OpenPart] = {}

    def __enter__(self) -> "FeatureReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": {}}

    def close(self) -> None:
        """Lets go of maps and files; a later `gather` opens them again."""
        for part in self._parts.values():
            part.close()
        self._parts = {}

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
        call costs more than the reading. A row's CRC is checked the first time that it is read. Raises CacheError
        for a row that is out of range, was never written, cannot be read, or is not what was written.
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
        parts = np.searchsorted(self._ends, rows, side="right").tolist()
        for place, (index, row) in enumerate(zip(parts, rows.tolist(), strict=True)):
            part = self._parts.get(index) or self._open(index)
            part.read(row - part.start, features[place])
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
            raise CacheError(f"{path}: cannot be read: {error}. {_RENEW}") from error
        if not sound:
            raise CacheError(f"{path}: is not what was written. {_RENEW}")
        table = TextTable.load(path)
        if len(table) != entry.questions or (len(table) and table.image_row.max() >= self._total):
            raise CacheError(f"{path}: does not belong to {MANIFEST_NAME} beside it. {_RENEW}")
        return table

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

    def _open(self, index: int) -> "_OpenPart":
        layout = self._inspect(index)
        try:
            part = _OpenPart(layout, int(self._ends[index]) - layout.rows, self.io)
        except (OSError, ValueError) as error:
            raise CacheError(f"{layout.path}: cannot be opened: {error}. Is its disk still there?") from error
        self._parts[index] = part
        return part


class _OpenPart:
    """One part's rows, as a map or an open file, and which of them were found good."""

    def __init__(self, layout: PartLayout, start: int, io: str) -> None:
        self.start = start
        """Row of the cache that is this part's first."""
        self._layout = layout
        self._checked = np.zeros(layout.rows, bool)
        self._map: Array | None = None
        self._descriptor = -1
        if io == "pread":
            self._descriptor = os.open(layout.path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            shape = (layout.rows, layout.spec.query_tokens, layout.spec.width)
            whole = np.memmap(layout.path, layout.spec.storage_dtype, "r", layout.features_offset, shape)
            self._map = np.asarray(whole)  # a memmap's own indexing is ten times slower

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, row: int, out: Array) -> None:
        """Copies a row of the part to `out` (Q, D). Raises CacheError."""
        if self._map is not None:
            out[...] = self._map[row]
        else:
            layout = self._layout
            try:
                pread_into(self._descriptor, as_bytes(out), layout.features_offset + row * layout.spec.row_bytes)
            except OSError as error:
                raise CacheError(f"{layout.path}: cannot be read: {error}. Is its disk still there?") from error
        if not self._checked[row]:
            self._check(row, out)

    def _check(self, row: int, features: Array) -> None:
        wanted = int(self._layout.crc32[row])
        place = f"{self._layout.path}: row {row} (row {self.start + row} of the cache)"
        if wanted < 0:
            raise CacheError(f"{place} was never written. {_RENEW}")
        if zlib.crc32(as_bytes(features)) != wanted:
            raise CacheError(
                f"{place} is not what was written, the file is damaged. Run `pipe cache repair`, or delete the file "
                "and run `pipe precompute` again: its rows are made anew."
            )
        self._checked[row] = True


_RENEW = "Run `pipe precompute` again: it renews the text."


def _check_size(folder: Path, part: PartEntry, row_bytes: int) -> None:
    path, wanted = folder / part.file, part.head_bytes + part.rows * row_bytes
    try:
        found = path.stat().st_size
    except OSError as error:
        advice = "Run `pipe precompute` again: what was in it is made anew."
        raise CacheError(f"{path}: this part is missing ({error.strerror}). {advice}") from None
    if found != wanted:
        raise CacheError(
            f"{path}: has {found} bytes, must have {wanted}: it was cut short or changed. Delete it and run "
            "`pipe precompute` again: what was in it is made anew."
        )


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

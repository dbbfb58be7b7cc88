"""The reader of a finished cache: features by row, checked at first read, without loading the cache into memory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from cache import portability
from cache.files import as_bytes, sha256_of
from cache.format import PartLayout, check_head, inspect_part
from cache.hdf5 import REPAIR_ADVICE, read_error
from cache.lock import ReadLock
from cache.manifest import MANIFEST_NAME, Manifest, PartEntry, attachment_file
from cache.part_reader import OpenFile, PartReader, can_map_part
from cache.spec import CacheError
from cache.text import TextTable
from cache.thumbnails import Thumbnails, thumbnails_name

MAX_OPEN_FILES = 128
"""Number of files per reader that are kept open to read rows of parts that are not mapped."""
_STALE_TEXT = "Run `pipe precompute` again to rewrite the text."

Array = np.ndarray[Any, Any]


class FeatureReader:
    """Reader of the finished cache in `folder`, which cannot be removed or repaired until `close`.

    Opening takes the same time for any number of rows: a part is opened, checked and mapped when its first row is
    read. Threads can share a reader. A pickled reader opens its files again.

    Args:
        folder: The cache.
        io: "memmap", or "pread", which is slower but raises CacheError when a network mount disappears, where a memory
            map kills the process.

    Raises:
        CacheError: There is no finished cache, its manifest is damaged, or a file is missing or has another size.
    """

    def __init__(self, folder: Path, io: str = "memmap") -> None:
        """Load the manifest and take the read lock."""
        if io not in ("memmap", "pread"):
            raise CacheError(f"cache.io is {io!r}, must be memmap or pread")
        self.folder, self.io = Path(folder), io
        self._read_lock: ReadLock | None = ReadLock(self.folder)
        self.manifest = _load_manifest(self.folder)
        self.spec = self.manifest.spec
        self.rows = self.manifest.rows
        """Number of stored images. Row numbers can be higher, since parts may have rows that were never written."""
        self.splits: dict[str, int] = {split: text.questions for split, text in self.manifest.splits.items()}
        """Number of questions per split."""
        for part in self.manifest.parts:
            _check_size(self.folder, part, self.spec.row_bytes)
        self._ends = np.cumsum([part.rows for part in self.manifest.parts], dtype=np.int64)
        self._reset()

    def __enter__(self) -> "FeatureReader":
        """Return this reader."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close this reader."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files."""
        unpicklable = ("_parts", "_opening", "_checked", "_open_file", "_read_lock")
        return {name: value for name, value in self.__dict__.items() if name not in unpicklable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a reader that has no part open yet."""
        self.__dict__.update(state)
        self._read_lock = None
        self._reset()

    def close(self) -> None:
        """Release maps, files and the lock. A later `gather` opens and checks them again."""
        self._reset()
        if self._read_lock:
            self._read_lock.release()
            self._read_lock = None

    def _reset(self) -> None:
        self._parts: dict[int, PartReader] = {}
        self._open_file = lru_cache(min(MAX_OPEN_FILES, portability.max_open_files() // 8))(OpenFile)
        self._opening = Lock()
        self._checked = np.zeros(self._total, bool)  # rows whose CRC was checked

    def stored(self) -> Iterator[tuple[bytes, int]]:
        """Yield the SHA-256 of the image file and the row of every stored image, in the order of the rows."""
        start = 0
        for index in range(len(self.manifest.parts)):
            layout = self._inspect(index)
            for row in np.flatnonzero(layout.crc32 >= 0).tolist():
                yield layout.digests[row].tobytes(), start + row
            start += layout.rows

    def gather(self, rows: Array, out: Array | None = None) -> Array:
        """Return the features (n, Q, D) of `rows` (n,), integers in any order.

        The CRC of a row is checked when this reader reads it first, and not again, since that would take four times as
        long as reading. Changes on disk after that are found by a new process or by `verify`.

        Args:
            rows: Rows of the cache.
            out: Contiguous array of the result's shape and type to fill, since allocating one costs more than reading.

        Returns:
            Features in the storage type, uint16 for bfloat16; `out` if it was given.

        Raises:
            CacheError: A row is out of range, was never written, cannot be read, or is damaged.
        """
        rows = np.asarray(rows, np.int64)
        features = self._output(len(rows), out)
        self._check_range(rows)
        indices = np.searchsorted(self._ends, rows, side="right")
        parts, checked = self._open(np.unique(indices).tolist()), self._checked
        order = np.argsort(rows, kind="stable")  # part by part
        data, row_bytes = as_bytes(features), self.spec.row_bytes
        for i, index, row in zip(order.tolist(), indices[order].tolist(), rows[order].tolist(), strict=True):
            part, target = parts[index], data[i * row_bytes : (i + 1) * row_bytes]
            part.read(row, target, self._open_file)
            if not checked[row]:
                part.check(row, target)
                checked[row] = True
        return features

    def _output(self, count: int, out: Array | None) -> Array:
        shape = (count, self.spec.query_tokens, self.spec.width)
        if out is None:
            return np.empty(shape, self.spec.storage_dtype)
        assert (out.shape, out.dtype) == (shape, self.spec.storage_dtype), "out has another shape or type"
        assert out.flags.c_contiguous, "out is not contiguous"
        return out

    def _check_range(self, rows: Array) -> None:
        outside = (rows < 0) | (rows >= self._total)
        if outside.any():
            row = int(rows[outside][0])
            raise CacheError(f"{self.folder}: row {row} is out of range, there are {self._total} rows. {_STALE_TEXT}")

    def text(self, split: str) -> TextTable:
        """Return the questions of a split. Raises CacheError if there is no such split or its file is damaged."""
        if split not in self.splits:
            raise CacheError(f"{self.folder}: no split {split!r}; there are: {', '.join(self.splits) or 'none'}")
        entry = self.manifest.splits[split]
        path = self.folder / entry.file
        try:
            is_sound = sha256_of(path) == entry.sha256
        except OSError as error:
            raise read_error(path, error) from error
        if not is_sound:
            raise CacheError(f"{path}: is damaged (SHA-256 mismatch). {_STALE_TEXT}")
        table = TextTable.load(path)
        if len(table) != entry.questions or (len(table) and table.image_row.max() >= self._total):
            raise CacheError(f"{path}: does not match {MANIFEST_NAME}. {_STALE_TEXT}")
        return table

    def thumbnails(self, rows: Iterable[int]) -> dict[int, bytes]:
        """Return the thumbnail file (JPEG, PNG, WebP or GIF) of each row that has one; old caches have none.

        Raises:
            CacheError: A file of thumbnails is damaged.
        """
        found: dict[int, bytes] = {}
        inside = sorted({row for row in rows if 0 <= row < self._total})
        for index, rows_of_part in groupby(inside, lambda row: int(np.searchsorted(self._ends, row, side="right"))):
            part = self.manifest.parts[index]
            if (name := thumbnails_name(part.file)) in self.manifest.attachments:
                images = Thumbnails.load(self.attachment(name)).images
                start = int(self._ends[index]) - part.rows
                found |= {row: data for row in rows_of_part if (data := images[row - start].tobytes())}
        return found

    def attachment(self, name: str) -> Path:
        """Return the path of an attachment. Raises CacheError if there is none of that name or it is damaged."""
        if name not in self.manifest.attachments:
            names = ", ".join(self.manifest.attachments) or "none"
            raise CacheError(f"{self.folder}: no attachment {name!r}; there are: {names}")
        sha256 = self.manifest.attachments[name]
        path = self.folder / attachment_file(name, sha256)
        check_head(path, None, sha256)
        return path

    @property
    def _total(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _inspect(self, index: int) -> PartLayout:
        """Return the layout of a part after all checks but those of its rows."""
        entry = self.manifest.parts[index]
        path = self.folder / entry.file
        entry.check(self.folder, self.spec.row_bytes)
        layout = inspect_part(path)
        if layout.spec != self.spec:
            lines = "; ".join(layout.spec.diff(self.spec))
            raise CacheError(f"{path}: is of another cache ({lines}). Delete it and run `pipe precompute` again.")
        if (layout.rows, layout.features_offset) != (entry.rows, entry.head_bytes):
            raise CacheError(f"{path}: its layout does not match {MANIFEST_NAME}. Run `pipe precompute` again.")
        return layout

    def _open(self, indices: Sequence[int]) -> dict[int, PartReader]:
        """Return the parts by index, opening those that are not open yet."""
        parts = self._parts
        missing = [index for index in indices if index not in parts]
        if missing:
            with self._opening:
                self._read_lock = self._read_lock or ReadLock(self.folder)
                for index in missing:
                    if index not in parts:
                        parts[index] = self._open_part(index)
        return parts

    def _open_part(self, index: int) -> PartReader:
        layout = self._inspect(index)
        is_mapped = self.io == "memmap" and can_map_part()
        try:
            return PartReader(layout, int(self._ends[index]) - layout.rows, is_mapped)
        except OSError as error:
            raise read_error(layout.path, error) from error


def _check_size(folder: Path, part: PartEntry, row_bytes: int) -> None:
    path, size = folder / part.file, part.size(row_bytes)
    try:
        found = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from error
    if found != size:
        raise CacheError(f"{path}: has {found} bytes, must have {size}. {REPAIR_ADVICE}")


def _load_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise CacheError(f"no cache at {folder}. Run `pipe precompute` first, or set cache.dir=FOLDER.")
    if not (folder / MANIFEST_NAME).exists():
        raise CacheError(
            f"{folder}: unfinished cache, it has no {MANIFEST_NAME}. Run the same `pipe precompute` command again to "
            "resume."
        )
    return Manifest.load(folder)

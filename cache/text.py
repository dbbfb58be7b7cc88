"""The questions of one split: raw records, tokens, and the row of each question's image."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cache.files import rename, sha256_of, temporary_path
from cache.hdf5 import read_arrays, write_arrays
from cache.manifest import TextEntry
from cache.spec import FORMAT_VERSION, CacheError, DamagedFileError

TEXT_HEAD_BYTES = 64 << 10
"""Upper bound of a text file's size beyond its columns: HDF5 metadata and alignment."""
_RAGGED = {"records": np.dtype(np.uint8), "prompt_ids": np.dtype("<i4"), "target_ids": np.dtype("<i4")}


@dataclass(frozen=True, eq=False)
class Ragged:
    """n rows of different lengths in one array: row i is `values[offsets[i]:offsets[i + 1]]`.

    Raises:
        CacheError: The offsets do not divide `values` (1-D) into rows.
    """

    values: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    """(n + 1,) int64, from 0 to `len(values)`, not decreasing."""

    def __post_init__(self) -> None:
        """Check types and offsets."""
        offsets = self.offsets
        if self.values.ndim != 1 or offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
            raise CacheError(f"ragged rows need 1-D values and int64 offsets, found {offsets.dtype} {offsets.shape}")
        if offsets[0] != 0 or offsets[-1] != len(self.values) or np.any(offsets[1:] < offsets[:-1]):
            raise CacheError(f"offsets of ragged rows must increase from 0 to {len(self.values)}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        """Return row i."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row: np.ndarray[Any, Any] = self.values[self.offsets[i] : self.offsets[i + 1]]
        return row

    def take(self, rows: np.ndarray[Any, Any]) -> "Ragged":
        """Return the rows (n,), in any order, as a new array."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[places], offsets)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int]], dtype: DTypeLike) -> "Ragged":
        """Concatenate rows of integers; `bytes` count as integers."""
        rows = list(rows)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        if rows and all(isinstance(row, bytes) for row in rows):
            return cls(np.frombuffer(b"".join(map(bytes, rows)), np.uint8).astype(dtype, copy=False), offsets)
        arrays = [np.frombuffer(row, np.uint8) if isinstance(row, bytes) else np.asarray(row, dtype) for row in rows]
        return cls(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype), offsets)


@dataclass(frozen=True, eq=False)
class TextTable:
    """The n questions of one split.

    Raises:
        CacheError: A column does not have n rows or has another type.
    """

    records: Ragged
    """uint8: one JSON object in UTF-8 per question (question_id, image, question, answers, ...)."""
    image_row: np.ndarray[Any, Any]
    """(n,) int64: row of the image in the cache, for `FeatureReader.gather`."""
    prompt_ids: Ragged
    """int32: token ids of the prompt."""
    target_ids: Ragged
    """int32: token ids of the target answer."""
    prompt: str
    """Template of the prompts."""
    tokenizer: str
    """Fingerprint of the tokenizer."""

    def __post_init__(self) -> None:
        """Check the columns."""
        for name, dtype in _RAGGED.items():
            column: Ragged = getattr(self, name)
            if len(column) != len(self) or column.values.dtype != dtype:
                raise CacheError(
                    f"{name} has {len(column)} rows of {column.values.dtype}, must have {len(self)} of {dtype}"
                )
        if self.image_row.ndim != 1 or self.image_row.dtype != np.int64 or np.any(self.image_row < 0):
            raise CacheError("image_row must be 1-D int64 and not negative")

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.image_row)

    @property
    def nbytes(self) -> int:
        """Size of all columns in bytes."""
        ragged = [getattr(self, name) for name in _RAGGED]
        return int(self.image_row.nbytes + sum(column.values.nbytes + column.offsets.nbytes for column in ragged))

    def record(self, i: int) -> dict[str, Any]:
        """Return the record of question i. Raises CacheError if it is not a JSON object."""
        try:
            record = json.loads(self.records[i].tobytes())
        except ValueError as error:
            raise CacheError(f"record {i} of the text is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CacheError(f"record {i} of the text is not a JSON object")
        return record

    def equals(self, other: "TextTable") -> bool:
        """Return whether both tables are identical."""
        ragged = [(getattr(self, name), getattr(other, name)) for name in _RAGGED]
        return (
            (self.prompt, self.tokenizer) == (other.prompt, other.tokenizer)
            and np.array_equal(self.image_row, other.image_row)
            and all(np.array_equal(mine.offsets, its.offsets) for mine, its in ragged)
            and all(np.array_equal(mine.values, its.values) for mine, its in ragged)
        )

    def save(self, folder: Path, split: str) -> TextEntry:
        """Write the table to a new file in `folder`, whose name contains its digest so that no file is replaced.

        Raises:
            CacheError: The split's name is not allowed in a file name.
            OSError: The file cannot be written.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
            raise CacheError(f"{split!r} is not allowed as the name of a split: use letters, digits, _ and -")
        arrays = {"image_row": self.image_row}
        for name in _RAGGED:
            column: Ragged = getattr(self, name)
            arrays |= {name: column.values, f"{name}_offsets": column.offsets}
        attributes: dict[str, str | int] = {
            "format_version": FORMAT_VERSION,
            "prompt": self.prompt,
            "tokenizer": self.tokenizer,
        }
        temporary = temporary_path(folder / f"text-{split}.h5")
        write_arrays(temporary, arrays, attributes)
        sha256 = sha256_of(temporary)
        entry = TextEntry(f"text-{split}-{sha256[:12]}.h5", len(self), sha256)
        rename(temporary, folder / entry.file)
        return entry

    @classmethod
    def load(cls, path: Path) -> "TextTable":
        """Load the table that `save` wrote. Raises FileError if the file is damaged."""
        arrays, attributes = read_arrays(path)
        try:
            if attributes["format_version"] != FORMAT_VERSION:
                raise CacheError(f"format version {attributes['format_version']}, only {FORMAT_VERSION} is supported")
            columns = {name: Ragged(arrays[name], arrays[f"{name}_offsets"]) for name in _RAGGED}
            prompt, tokenizer = str(attributes["prompt"]), str(attributes["tokenizer"])
            return cls(image_row=arrays["image_row"], prompt=prompt, tokenizer=tokenizer, **columns)
        except (CacheError, KeyError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            advice = "Run `pipe precompute` again to rewrite the text."
            raise DamagedFileError(path, problem, advice) from error

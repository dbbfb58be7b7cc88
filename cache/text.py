"""The text beside the features: the questions of one split, raw and as tokens, and the row of each one's image."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cache.files import rename, sha256_of, temporary_path
from cache.format import read_arrays, write_arrays
from cache.manifest import TextEntry
from cache.spec import FORMAT_VERSION, CacheError, DamagedFileError

TEXT_HEAD_BYTES = 64 << 10
"""Of a text's file beside its columns, at most: HDF5's metadata, and what aligns them to pages."""
_RAGGED = {"records": np.dtype(np.uint8), "prompt_ids": np.dtype("<i4"), "target_ids": np.dtype("<i4")}


@dataclass(frozen=True, eq=False)
class Ragged:
    """n rows of unequal length in one array: row i is `values[offsets[i]:offsets[i + 1]]`.

    Raises CacheError on construction if the offsets do not cut `values` (1-D) into rows.
    """

    values: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    """(n + 1,) int64, rising from 0 to `len(values)`."""

    def __post_init__(self) -> None:
        offsets = self.offsets
        if self.values.ndim != 1 or offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
            raise CacheError(f"ragged rows need 1-D values and int64 offsets, found {offsets.dtype} {offsets.shape}")
        if offsets[0] != 0 or offsets[-1] != len(self.values) or np.any(offsets[1:] < offsets[:-1]):
            raise CacheError(f"offsets of ragged rows must rise from 0 to {len(self.values)}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row: np.ndarray[Any, Any] = self.values[self.offsets[i] : self.offsets[i + 1]]
        return row

    def take(self, rows: np.ndarray[Any, Any]) -> "Ragged":
        """Rows (n,) in any order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[places], offsets)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int]], dtype: DTypeLike) -> "Ragged":
        """Puts rows of whole numbers (`bytes` count as such) one after the other."""
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

    Raises CacheError on construction if the columns are not of n rows or not of their types.
    """

    records: Ragged
    """uint8: one question each, a JSON object in UTF-8 (question_id, image, question, answers, ...)."""
    image_row: np.ndarray[Any, Any]
    """(n,) int64: the image's row in the cache, as `FeatureReader.gather` takes it."""
    prompt_ids: Ragged
    """int32: tokens of the filled-in prompt."""
    target_ids: Ragged
    """int32: tokens of the answer to be learnt."""
    prompt: str
    """The template that the prompts were made from."""
    tokenizer: str
    """Fingerprint of the tokenizer that the tokens are of."""

    def __post_init__(self) -> None:
        for name, dtype in _RAGGED.items():
            column: Ragged = getattr(self, name)
            if len(column) != len(self) or column.values.dtype != dtype:
                raise CacheError(f"{name} is {len(column)} rows of {column.values.dtype}, not {len(self)} of {dtype}")
        if self.image_row.ndim != 1 or self.image_row.dtype != np.int64 or np.any(self.image_row < 0):
            raise CacheError("image_row must be 1-D int64 and not negative")

    def __len__(self) -> int:
        return len(self.image_row)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        ragged = [getattr(self, name) for name in _RAGGED]
        return int(self.image_row.nbytes + sum(column.values.nbytes + column.offsets.nbytes for column in ragged))

    def record(self, i: int) -> dict[str, Any]:
        """Question i as it was given. Raises CacheError if it is not a JSON object."""
        try:
            record = json.loads(self.records[i].tobytes())
        except ValueError as error:
            raise CacheError(f"record {i} of the text is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CacheError(f"record {i} of the text is not a JSON object")
        return record

    def equals(self, other: "TextTable") -> bool:
        """Whether both hold the same, to the byte."""
        ragged = [(getattr(self, name), getattr(other, name)) for name in _RAGGED]
        return (
            (self.prompt, self.tokenizer) == (other.prompt, other.tokenizer)
            and np.array_equal(self.image_row, other.image_row)
            and all(np.array_equal(mine.offsets, its.offsets) for mine, its in ragged)
            and all(np.array_equal(mine.values, its.values) for mine, its in ragged)
        )

    def save(self, folder: Path, split: str) -> TextEntry:
        """Writes the table to a file of its own in `folder`, named after its digest, so that none is replaced.

        Raises CacheError if the split's name is no file name, OSError.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
            raise CacheError(f"{split!r} is not a name that a split may have: letters, digits, _ and -")
        arrays = {"image_row": self.image_row}
        for name in _RAGGED:
            column: Ragged = getattr(self, name)
            arrays |= {name: column.values, f"{name}_offsets": column.offsets}
        attributes: dict[str, str | int] = {
            "format_version": FORMAT_VERSION,
            "prompt": self.prompt,
            "tokenizer": self.tokenizer,
        }
        building = temporary_path(folder / f"text-{split}.h5")
        write_arrays(building, arrays, attributes)
        sha256 = sha256_of(building)
        entry = TextEntry(f"text-{split}-{sha256[:12]}.h5", len(self), sha256)
        rename(building, folder / entry.file)
        return entry

    @classmethod
    def load(cls, path: Path) -> "TextTable":
        """The inverse of `save`. Raises CacheError, with the path, if the file is not a sound table."""
        arrays, attributes = read_arrays(path)
        try:
            if attributes["format_version"] != FORMAT_VERSION:
                raise CacheError(f"format version {attributes['format_version']}, this program knows {FORMAT_VERSION}")
            columns = {name: Ragged(arrays[name], arrays[f"{name}_offsets"]) for name in _RAGGED}
            prompt, tokenizer = str(attributes["prompt"]), str(attributes["tokenizer"])
            return cls(image_row=arrays["image_row"], prompt=prompt, tokenizer=tokenizer, **columns)
        except (CacheError, KeyError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            advice = "Run `pipe precompute` again: it writes the text anew."
            raise DamagedFileError(path, problem, advice) from error

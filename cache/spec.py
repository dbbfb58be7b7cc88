"""What the features in a cache are: the `CacheSpec` that every part carries and every use of it is checked against."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1

STORAGE_DTYPES = {
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
}  # HDF5 has no bfloat16: its bits, as they are
_DIGEST = re.compile(r"[0-9a-f]{64}")


class CacheError(Exception):
    """Something is wrong with the user's cache; the message says what, where, and what to do next."""


class FileError(CacheError):
    """Something is wrong with one file of a cache; `problem` says what, and no more."""

    def __init__(self, path: Path, problem: str, advice: str) -> None:
        super().__init__(f"{path}: {problem}. {advice}")
        self.problem = problem


class DamagedFileError(FileError):
    """The file is not what was written."""


class UnreadableError(FileError):
    """The file cannot be read now, which says nothing of what is in it; the cause is an OSError."""


@dataclass(frozen=True)
class CacheSpec:
    """Identity of the features: rows of two caches may be mixed exactly if their specs are equal.

    Raises CacheError on construction if a field has a value that is not allowed.
    """

    encoder_fingerprint: str
    """SHA-256 over the encoder's tensors and settings, 64 hex digits."""
    encoder_dtype: str
    """What the encoder computed in: float32, float16 or bfloat16."""
    image_preprocessing: str
    """A JSON object; kept in canonical form (sorted keys, no spaces)."""
    query_tokens: int
    """Q, query tokens an image."""
    width: int
    """D, width of the Q-Former."""
    dtype: str
    """What a feature is stored as: float32, float16 or bfloat16."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                kind = "text" if field.type is str else "a whole number"
                raise CacheError(f"cache spec: {field.name} is {value!r}, must be {kind}")
        if self.format_version != FORMAT_VERSION:
            raise CacheError(f"cache format version {self.format_version}: this program knows {FORMAT_VERSION} only")
        if not _DIGEST.fullmatch(self.encoder_fingerprint):
            raise CacheError(f"encoder_fingerprint is {self.encoder_fingerprint!r}, must be 64 hex digits (SHA-256)")
        for name in ("encoder_dtype", "dtype"):
            if getattr(self, name) not in STORAGE_DTYPES:
                raise CacheError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(STORAGE_DTYPES)}")
        for name in ("query_tokens", "width"):
            if getattr(self, name) < 1:
                raise CacheError(f"{name} is {getattr(self, name)}, must be at least 1")
        object.__setattr__(self, "image_preprocessing", _canonical(self.image_preprocessing))

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """The numpy type of a stored number; uint16 stands for bfloat16."""
        return np.dtype(STORAGE_DTYPES[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the features (Q, D) of one image."""
        return self.query_tokens * self.width * self.storage_dtype.itemsize

    def to_attributes(self) -> dict[str, str | int]:
        """The fields by name, as plain str and int."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "CacheSpec":
        """The inverse of `to_attributes`; keys of others are ignored.

        Raises CacheError naming a field that is missing, ill-typed or not allowed.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in attributes]
        if missing:
            raise CacheError(f"cache spec lacks {', '.join(missing)}")
        return cls(**{name: attributes[name] for name in names})

    def diff(self, other: "CacheSpec") -> list[str]:
        """One line a field in which this spec (the cache's) differs from the `other` (the wanted one)."""
        lines = []
        for name, mine in self.to_attributes().items():
            wanted = getattr(other, name)
            if mine != wanted and name == "image_preprocessing":
                lines.append(f"{name}: {_json_diff(json.loads(self.image_preprocessing), json.loads(wanted))}")
            elif mine != wanted:
                lines.append(f"{name}: cache has {mine}, wanted {wanted}")
        return lines


def _canonical(text: str) -> str:
    try:
        value = json.loads(text)
        canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise CacheError(f"image_preprocessing is not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise CacheError(f"image_preprocessing must be a JSON object, found {text[:80]!r}")
    return canonical


def _json_diff(mine: dict[str, Any], wanted: dict[str, Any]) -> str:
    def show(side: dict[str, Any], key: str) -> str:
        return json.dumps(side[key]) if key in side else "nothing"

    keys = [key for key in sorted({*mine, *wanted}) if show(mine, key) != show(wanted, key)]
    return "; ".join(f"{key}: cache has {show(mine, key)}, wanted {show(wanted, key)}" for key in keys)

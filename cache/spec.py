"""The `CacheSpec`, which identifies the features of a cache, and the cache's errors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1

STORAGE_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""Type in numpy by dtype. HDF5 has no bfloat16, so its bits are stored as uint16."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class CacheError(Exception):
    """An error in the user's cache. The message says what is wrong, where, and what to do next."""


class FileError(CacheError):
    """An error in one file of a cache. `problem` describes it without path and advice."""

    def __init__(self, path: Path, problem: str, advice: str) -> None:
        """Join path, problem and advice, a sentence, to the message."""
        super().__init__(f"{path}: {problem}. {advice}")
        self.problem = problem


class DamagedFileError(FileError):
    """A file whose content is not what was written."""


class UnreadableError(FileError):
    """A file that cannot be read now, because of an OSError; its content may be intact."""


@dataclass(frozen=True)
class CacheSpec:
    """Identity of the features: rows of two caches are interchangeable if and only if their specs are equal.

    Raises:
        CacheError: A field has a value that is not allowed.
    """

    encoder_fingerprint: str
    """SHA-256 of the encoder's tensors and settings, 64 hex digits."""
    encoder_dtype: str
    """Data type the encoder computed in: float32, float16 or bfloat16."""
    image_preprocessing: str
    """JSON object in canonical form (sorted keys, no spaces)."""
    query_tokens: int
    """Q, query tokens per image."""
    width: int
    """D, hidden size of the Q-Former."""
    dtype: str
    """Data type features are stored in: float32, float16 or bfloat16."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check all fields."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                kind = "a string" if field.type is str else "an integer"
                raise CacheError(f"cache spec: {field.name} is {value!r}, must be {kind}")
        if self.format_version != FORMAT_VERSION:
            raise CacheError(f"cache format version {self.format_version}: only version {FORMAT_VERSION} is supported")
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
        """Type of a stored number in numpy; uint16 for bfloat16."""
        return np.dtype(STORAGE_DTYPES[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the features (Q, D) of one image."""
        return self.query_tokens * self.width * self.storage_dtype.itemsize

    def to_attributes(self) -> dict[str, str | int]:
        """Return the fields by name, as str and int."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "CacheSpec":
        """Return the spec whose `to_attributes` these are; other keys are ignored.

        Raises:
            CacheError: A field is missing, or its type or value is not allowed.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in attributes]
        if missing:
            raise CacheError(f"cache spec lacks {', '.join(missing)}")
        return cls(**{name: attributes[name] for name in names})

    def diff(self, other: "CacheSpec") -> list[str]:
        """Return one line per field in which this spec, the cache's, differs from the requested `other`."""
        lines = []
        for name, mine in self.to_attributes().items():
            requested = getattr(other, name)
            if mine != requested and name == "image_preprocessing":
                lines.append(f"{name}: {_json_diff(json.loads(self.image_preprocessing), json.loads(requested))}")
            elif mine != requested:
                lines.append(f"{name}: cache has {mine}, wanted {requested}")
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


def _json_diff(mine: dict[str, Any], requested: dict[str, Any]) -> str:
    def show(side: dict[str, Any], key: str) -> str:
        return json.dumps(side[key]) if key in side else "nothing"

    keys = [key for key in sorted({*mine, *requested}) if show(mine, key) != show(requested, key)]
    return "; ".join(f"{key}: cache has {show(mine, key)}, wanted {show(requested, key)}" for key in keys)

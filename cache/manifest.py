"""The manifest: written last, it makes a folder of parts a finished cache and says what belongs to it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.files import write_text_atomically
from cache.format import PART_NAME
from cache.spec import FORMAT_VERSION, CacheError, CacheSpec

MANIFEST_NAME = "manifest.json"
_FORMAT = "blip2-query-features"
_TEXT_NAME = re.compile(r"text-[A-Za-z0-9][A-Za-z0-9_.-]*\.h5")


@dataclass(frozen=True)
class Manifest:
    """What a finished cache consists of. Raises CacheError on construction for a file name that is not a cache's."""

    spec: CacheSpec
    part_rows: int
    """Rows of a full part, as the last writer was told."""
    parts: list[tuple[str, int]]
    """File and rows of each part, in the order that numbers the rows of the cache."""
    rows: int
    """Rows that hold features; parts may have more."""
    splits: dict[str, tuple[str, int]]
    """File and number of questions of each split's text."""
    provenance: dict[str, str]
    """Where the features come from, in words; nothing is checked against it."""

    def __post_init__(self) -> None:
        for file, _ in self.parts:
            found = PART_NAME.fullmatch(file)
            if not found or found[2]:
                raise CacheError(f"{file!r} is not the name of a sealed part inside the cache's folder")
        for split, (file, _) in self.splits.items():
            if not _TEXT_NAME.fullmatch(file):
                raise CacheError(f"{file!r}, text of split {split!r}, is not a file name that a cache may have")

    def save(self, folder: Path) -> None:
        """Writes or replaces the manifest in one step. Raises OSError."""
        content = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_attributes(),
            "part_rows": self.part_rows,
            "parts": [{"file": file, "rows": rows} for file, rows in self.parts],
            "rows": self.rows,
            "splits": {split: {"file": file, "questions": n} for split, (file, n) in self.splits.items()},
            "provenance": self.provenance,
        }
        write_text_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The inverse of `save`. Raises CacheError if it is unreadable or of another version, OSError."""
        path = folder / MANIFEST_NAME
        try:
            return cls._parse(json.loads(path.read_bytes()))
        except (CacheError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            advice = "delete this one file and run `pipe precompute` again: the features are kept."
            raise CacheError(f"{path}: cannot be used: {problem}. If it is damaged, {advice}") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> "Manifest":
        name, version = content["format"], content["format_version"]
        if (name, version) != (_FORMAT, FORMAT_VERSION):
            raise CacheError(f"it is of {name} version {version}, this program knows {_FORMAT} {FORMAT_VERSION}")
        return cls(
            spec=CacheSpec.from_attributes(content["spec"]),
            part_rows=int(content["part_rows"]),
            parts=[(str(part["file"]), int(part["rows"])) for part in content["parts"]],
            rows=int(content["rows"]),
            splits={name: (str(text["file"]), int(text["questions"])) for name, text in content["splits"].items()},
            provenance={str(key): str(value) for key, value in content["provenance"].items()},
        )


def text_name(split: str) -> str:
    """File name of the text of a split."""
    return f"text-{split}.h5"

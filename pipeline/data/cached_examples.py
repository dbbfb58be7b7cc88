"""Reuse the questions of a finished cache if its annotation files have not changed, instead of parsing them again."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, overload

from cache.files import sha256_of
from cache.reader import FeatureReader
from cache.spec import CacheError
from cache.text import TextTable
from pipeline.config import DataConfig, SplitFiles
from pipeline.data.examples import VQAExample
from pipeline.data.image_sources import ImageSource

READERS = (
    "examples.py",
    "records.py",
    "record_files.py",
    "sources.py",
    "tables.py",
    "image_sources.py",
    "vqa.py",
    "formats/*.py",
)
_FILES = ("annotations", "questions")
# A record is JSON, which escapes quotes inside texts, so this matches only the field.
_IMAGE = re.compile(rb'"image": "([^"\\]*(?:\\.[^"\\]*)*)"')


class CachedExamples(Sequence[VQAExample]):
    """The questions of a text table, created on access. Their images are known without parsing the records."""

    def __init__(self, text: TextTable, images: list[ImageSource]) -> None:
        """Wrap a text table; `images`: the image of each question."""
        self.text, self.images = text, images

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.text)

    @overload
    def __getitem__(self, index: int) -> VQAExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[VQAExample]: ...
    def __getitem__(self, index: int | slice) -> VQAExample | list[VQAExample]:
        """Parse one question or several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return VQAExample.from_record(self.text.record(index))

    def __iter__(self) -> Iterator[VQAExample]:
        """Parse the questions one by one."""
        return (self[number] for number in range(len(self)))


def images_of(examples: Sequence[VQAExample]) -> list[ImageSource]:
    """Return the image of each example."""
    return examples.images if isinstance(examples, CachedExamples) else [example.image for example in examples]


def load_unchanged_split(
    earlier: FeatureReader, data: DataConfig, split: str
) -> tuple[CachedExamples, dict[str, str]] | None:
    """Return the cached questions of a split and the SHA-256 of its files, or None if the files must be parsed.

    Parsing is unnecessary if the bytes of the annotation files, their config keys and the code of the readers are the
    same, and no question was skipped and no image path matched by another spelling, which also depends on the images.
    """
    files, provenance = data.splits[split], earlier.manifest.provenance
    settings: dict[str, Any] = provenance.get("config", {}).get("data", {})
    hashes: dict[str, str] = provenance.get("sources", {}).get(split, {})
    is_same = (
        reader_fingerprint() == provenance.get("reader", "")
        and not provenance.get("skipped")
        and not provenance.get("respelled")
        and settings.get("format") == data.format
        and settings.get(split) == files.absolute().model_dump(mode="json")
        and hashes
        and hashes == _hashes(files)
    )
    if not is_same or split not in earlier.splits:
        return None
    with suppress(CacheError):
        text = earlier.text(split)
        images = _images(text)
        if files.images and images and images[0].is_relative_to(files.images):  # spelled as they would be now
            return CachedExamples(text, [*images]), hashes
    return None


@cache
def reader_fingerprint() -> str:
    """Return the SHA-256 (hex) of the code that reads annotations: results of other code are not reused."""
    folder = Path(__file__).parent
    paths = sorted(path for pattern in READERS for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _hashes(files: SplitFiles) -> dict[str, str]:
    """Return the SHA-256 of each annotation file of the config; empty if one cannot be read."""
    with suppress(OSError):
        return {key: sha256_of(path) for key in _FILES if (path := getattr(files, key))}
    return {}


def _images(text: TextTable) -> list[Path]:
    """Return the image of every question; empty if a record does not have the format of `_IMAGE`."""

    @cache
    def path(escaped: bytes) -> Path:
        return Path(json.loads(b'"' + escaped + b'"') if b"\\" in escaped else escaped.decode())

    found = [path(escaped) for escaped in _IMAGE.findall(text.records.values.tobytes())]
    return found if len(found) == len(text) else []

"""The questions of a finished cache, where all that they were read from is as it was: nothing need be parsed again."""

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
from pipeline.data.tables import ImageSource

READERS = ("examples.py", "records.py", "record_files.py", "sources.py", "tables.py", "vqa.py", "formats/*.py")
_FILES = ("annotations", "questions")
# A record is JSON: a quote inside a text stands behind a backslash, so that this can only be the field.
_IMAGE = re.compile(rb'"image": "([^"\\]*(?:\\.[^"\\]*)*)"')


class CachedExamples(Sequence[VQAExample]):
    """The questions of a text table, each made when it is asked for; their images are known at once."""

    def __init__(self, text: TextTable, images: list[ImageSource]) -> None:
        self.text, self.images = text, images

    def __len__(self) -> int:
        return len(self.text)

    @overload
    def __getitem__(self, place: int) -> VQAExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[VQAExample]: ...
    def __getitem__(self, place: int | slice) -> VQAExample | list[VQAExample]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return VQAExample.from_record(self.text.record(place))

    def __iter__(self) -> Iterator[VQAExample]:
        return (self[number] for number in range(len(self)))


def images_of(examples: Sequence[VQAExample]) -> list[ImageSource]:
    """The image of each."""
    return examples.images if isinstance(examples, CachedExamples) else [example.image for example in examples]


def unchanged_split(
    earlier: FeatureReader, data: DataConfig, split: str
) -> tuple[CachedExamples, dict[str, str]] | None:
    """The cached questions of a split, and the SHA-256 of its files, if reading them would give the very same.

    They would if the bytes of the annotation files, the config's keys for them and the code that reads are the same,
    and nothing was skipped or respelled: those depend on the images, too. None otherwise.
    """
    files, made = data.splits[split], earlier.manifest.provenance
    settings: dict[str, Any] = made.get("config", {}).get("data", {})
    hashes: dict[str, str] = made.get("sources", {}).get(split, {})
    is_same = (
        reader_fingerprint() == made.get("reader", "")
        and not made.get("skipped")
        and not made.get("respelled")
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
        if files.images and images and images[0].is_relative_to(files.images):  # as they would be spelled now
            return CachedExamples(text, [*images]), hashes
    return None


@cache
def reader_fingerprint() -> str:
    """SHA-256 (hex) of the code that reads annotations; a cache is not asked about what other code has read."""
    folder = Path(__file__).parent
    paths = sorted(path for pattern in READERS for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _hashes(files: SplitFiles) -> dict[str, str]:
    """Of the annotation files that the config names; none if one cannot be read."""
    with suppress(OSError):
        return {key: sha256_of(path) for key in _FILES if (path := getattr(files, key))}
    return {}


def _images(text: TextTable) -> list[Path]:
    """Of every question; none if a record is not as this program writes it."""

    @cache
    def path(spelled: bytes) -> Path:
        return Path(json.loads(b'"' + spelled + b'"') if b"\\" in spelled else spelled.decode())

    found = [path(spelled) for spelled in _IMAGE.findall(text.records.values.tobytes())]
    return found if len(found) == len(text) else []

"""Read the annotations of every split, and every image file once for its digest, before stage one encodes."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.progress import progress_bar
from pipeline.config import SPLITS, DataConfig, SplitFiles
from pipeline.data.cached_examples import images_of, load_unchanged_split
from pipeline.data.examples import SkippedItem, Split, VQAExample
from pipeline.data.image_sources import ImageSource, MemoryImage
from pipeline.data.in_memory import read_in_memory
from pipeline.data.path_matching import match_paths
from pipeline.data.tables import table_fingerprint
from pipeline.data.vqa import read_examples
from pipeline.encoding.images import ImageError, check_header, image_digest, read_image_bytes

CHUNK_SIZE = 64
"""Images that a thread reads between two updates of the progress bar."""
NOT_FOUND = "not found"
"""Reason of `read_image_bytes` for a missing file."""
SIMILAR_NAME_FOUND = "not found under this name, only in other letter case"
JPEG_MAGIC = b"\xff\xd8"
LARGE_ANNOTATIONS = 50_000_000
"""Bytes of annotation files that take seconds to read: the progress bar is shown at once."""


@dataclass
class DatasetScan:
    """The dataset as found: the valid questions, and what was skipped."""

    splits: dict[str, Sequence[VQAExample]]
    skipped: list[SkippedItem]
    digests: dict[ImageSource, bytes]
    """SHA-256 of the file of every valid image."""
    num_images: int
    """Distinct image files or table rows that the annotations name."""
    sources: dict[str, dict[str, str]]
    """By split and config key: SHA-256 of the annotation files as they were parsed, or fingerprint of the tables."""
    rescaled: set[ImageSource] = field(default_factory=set)
    """Images with more than 8 bits per channel or float pixels; each is scaled to its own range."""
    num_respelled: int = 0
    """Images found under an equivalent spelling of their name."""

    @cached_property
    def images(self) -> dict[bytes, ImageSource]:
        """One source of each distinct image by digest, in the order of the questions."""
        sources = dict.fromkeys(image for split in self.splits.values() for image in images_of(split))
        return {self.digests[image]: image for image in sources}

    @property
    def num_invalid(self) -> int:
        """Images that were skipped."""
        return self.num_images - len(self.digests)

    @property
    def num_rescaled(self) -> int:
        """Distinct images that are scaled to their own range."""
        return sum(image in self.rescaled for image in self.images.values())

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """Skipped questions by reason."""
        counts: Counter[str] = Counter()
        for item in self.skipped:
            counts[item.reason] += item.questions
        return dict(counts)

    def without_images(self, failures: Mapping[bytes, str]) -> "DatasetScan":
        """Return the scan without the questions on some images: digest -> reason."""
        reasons = {image: failures[digest] for image, digest in self.digests.items() if digest in failures}
        return _skip_images(self, reasons, {}) if reasons else self

    def without_questions(self, split: str, positions: Mapping[int, str], reason: str) -> "DatasetScan":
        """Return the scan without some questions of a split: row -> position of the record."""
        examples = self.splits[split]
        skipped = [
            SkippedItem(split, reason, where, examples[row].question_id, str(examples[row].image))
            for row, where in positions.items()
        ]
        kept = [example for row, example in enumerate(examples) if row not in positions]
        return replace(self, splits={**self.splits, split: kept}, skipped=self.skipped + skipped)


class _ImageHeaders(NamedTuple):
    """What reading some images found."""

    digests: dict[ImageSource, bytes]
    rescaled: set[ImageSource]
    problems: dict[ImageSource, str]
    """Why the other images are invalid."""


def scan_dataset(
    data: DataConfig, earlier: FeatureReader | None = None, in_memory: Mapping[str, Any] | None = None
) -> DatasetScan:
    """Read the annotations of every split, and every image once for its digest.

    Args:
        data: the dataset's section of the config.
        earlier: a finished cache. Annotations that it was made of are not parsed again, and images that it contains are
            not checked again.
        in_memory: splits passed from Python; they replace those of the config.

    Raises:
        ConfigError: there is no split.
        PipelineError: annotations cannot be read, or a folder of images does not exist.
    """
    splits, sources = _read_splits(data, earlier, in_memory or {})
    examples = {split: found.examples for split, found in splits.items()}
    skipped = [item for found in splits.values() for item in found.skipped]
    images = dict.fromkeys(image for some in examples.values() for image in images_of(some))
    stored = _stored_digests(earlier)
    headers = _read_headers(list(images), stored)
    missing = [image for image, reason in headers.problems.items() if isinstance(image, Path) and reason == NOT_FOUND]
    equivalent, similar = match_paths(missing)
    if equivalent:
        examples = {split: _respell(some, equivalent) for split, some in examples.items()}
        headers = _read_respelled(headers, equivalent, stored)
    headers.problems.update(dict.fromkeys(similar, SIMILAR_NAME_FOUND))
    scan = DatasetScan(
        examples,
        skipped,
        headers.digests,
        len(headers.digests) + len(headers.problems),
        sources,
        headers.rescaled,
        len(equivalent),
    )
    return _skip_images(scan, headers.problems, similar)


def read_split(format: str, split: str, files: SplitFiles) -> tuple[Split, dict[str, str]]:
    """Return a split, and by config key the SHA-256 of its annotation files or the fingerprints of its tables."""
    hashes: dict[Path, str] = {}
    fingerprints = {key: table_fingerprint(table) for key, table in files.tables.items()}  # before they are read

    def on_read(path: Path, data: bytes) -> None:
        hashes[path] = hashlib.sha256(data).hexdigest()

    found = read_examples(format, split, files.annotations, files.images, files.questions, on_read, files.tables)
    by_key = {key: hashes[path] for key, path in files if path in hashes}
    return found, by_key | {key: value for key, value in fingerprints.items() if value}


def annotation_bytes(files: SplitFiles) -> int:
    """Return the size of the annotation files of one split; tables are not counted."""
    paths = [path for path in (files.annotations, files.questions) if path and path.is_file()]
    return sum(path.stat().st_size for path in paths)


def _read_splits(
    data: DataConfig, earlier: FeatureReader | None, in_memory: Mapping[str, Any]
) -> tuple[dict[str, Split], dict[str, dict[str, str]]]:
    """Return every split, and its entry of `DatasetScan.sources`."""
    names = [split for split in SPLITS if split in data.splits or split in in_memory]
    if not names:
        raise ConfigError("the config names no data: set data.train, or pass data={'train': records} from Python")
    for split, files in data.splits.items():
        if files.images and not files.images.is_dir():
            raise PipelineError(f"{files.images} (data.{split}.images): no such folder. Is its disk mounted?")
    splits, sources = {}, {}
    sizes = {split: annotation_bytes(data.splits[split]) for split in names if split not in in_memory}
    total = sum(sizes.values())
    delay = 0 if total > LARGE_ANNOTATIONS else 2
    with progress_bar("annotations", total, "B", scaled=True, delay=delay) as bar:
        for split in names:
            if split in in_memory:
                splits[split], sources[split] = read_in_memory(split, in_memory[split], data.splits.get(split))
            elif earlier and (unchanged := load_unchanged_split(earlier, data, split)):
                examples, sources[split] = unchanged
                splits[split] = Split(examples, [])
            else:
                splits[split], sources[split] = read_split(data.format, split, data.splits[split])
            bar.update(sizes.get(split, 0))
    return splits, sources


def _read_headers(images: Sequence[ImageSource], stored: Collection[bytes]) -> _ImageHeaders:
    """Read images for their digests; the headers of those whose digest is `stored` are not checked again."""

    def read_all(chunk: Sequence[ImageSource]) -> list[tuple[bytes, bool] | str]:
        return [_read_header(image, stored) for image in chunk]

    headers = _ImageHeaders({}, set(), {})
    chunks = [images[start : start + CHUNK_SIZE] for start in range(0, len(images), CHUNK_SIZE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar("reading", len(images), "images") as bar:
        for chunk, results in zip(chunks, pool.map(read_all, chunks), strict=True):
            for image, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    headers.problems[image] = result
                    continue
                headers.digests[image], is_rescaled = result
                if is_rescaled:
                    headers.rescaled.add(image)
            bar.update(len(chunk))
    return headers


def _read_header(image: ImageSource, stored: Collection[bytes]) -> tuple[bytes, bool] | str:
    """Return the digest and whether the image is rescaled, or why it is invalid."""
    try:
        data = read_image_bytes(image)
        digest = image_digest(data)
        if digest in stored and data.startswith(JPEG_MAGIC):  # a JPEG that Pillow reads has 8 bits per channel
            return digest, False
        return digest, check_header(data)
    except ImageError as error:
        return str(error)


def _stored_digests(earlier: FeatureReader | None) -> frozenset[bytes]:
    """Return the digests of the images whose features a cache contains."""
    with suppress(CacheError):  # a damaged part is reported when the cache is opened for writing
        return frozenset(digest for digest, _ in earlier.stored()) if earlier else frozenset()
    return frozenset()


def _read_respelled(headers: _ImageHeaders, names: Mapping[Path, Path], stored: Collection[bytes]) -> _ImageHeaders:
    """Replace missing files by those with equivalent names."""
    found = _read_headers([path for path in names.values() if path not in headers.digests], stored)
    problems = {image: reason for image, reason in headers.problems.items() if image not in names}
    return _ImageHeaders(headers.digests | found.digests, headers.rescaled | found.rescaled, problems | found.problems)


def _respell(examples: Sequence[VQAExample], names: Mapping[Path, Path]) -> list[VQAExample]:
    return [
        replace(example, image=names[example.image])
        if isinstance(example.image, Path) and example.image in names
        else example
        for example in examples
    ]


def _skip_images(scan: DatasetScan, reasons: Mapping[ImageSource, str], similar: Mapping[Path, Path]) -> DatasetScan:
    """Return the scan without the questions on the images in `reasons`; `similar`: files with similar names."""
    if not reasons:
        return scan
    skipped = list(scan.skipped)
    for split, examples in scan.splits.items():
        questions = Counter(example.image for example in examples if example.image in reasons)
        skipped += [
            SkippedItem(split, reasons[image], _position(image, similar), image=str(image), questions=count)
            for image, count in questions.items()
        ]
    kept: dict[str, Sequence[VQAExample]] = {
        split: [example for example in examples if example.image not in reasons]
        for split, examples in scan.splits.items()
    }
    digests = {image: digest for image, digest in scan.digests.items() if image not in reasons}
    return replace(scan, splits=kept, skipped=skipped, digests=digests)


def _position(image: ImageSource, similar: Mapping[Path, Path]) -> str:
    if isinstance(image, MemoryImage):
        return image.position
    found = similar.get(image) if isinstance(image, Path) else None
    return f"{image} (found {found})" if found else str(image)

"""Before stage one's work: what is to be done, what cannot be, and whether there is room for it."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from cache.estimate import WriteEstimate
from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, progress_bar
from pipeline.config import CacheConfig, DataConfig, SplitFiles
from pipeline.data.cached_examples import images_of, unchanged_split
from pipeline.data.examples import DUPLICATE_ANNOTATION, DUPLICATE_ID, SkippedItem, Split, VQAExample
from pipeline.data.path_matching import match_paths
from pipeline.data.tables import ImageSource, table_fingerprint
from pipeline.data.vqa import read_examples
from pipeline.encoding.images import ImageError, check_header, image_digest, read_image_bytes

SKIPPED_NAME = "skipped.jsonl"
MAX_NAMED = 3  # of what is left out, in a message
CHUNK_SIZE = 64  # pictures that a thread reads before the bar moves
NOT_THERE = "not there"  # as `read_image_bytes` puts it
NOT_THERE_AS_SPELLED = "not there with these capital letters"
JPEG = b"\xff\xd8"  # those that Pillow reads have 8 bits a channel: of one that was encoded the header tells no more
LARGE = 50_000_000  # bytes of annotations that take seconds to read


@dataclass
class DatasetScan:
    """The data set as it was found: the questions that can be trained on, and what cannot be and why."""

    splits: dict[str, Sequence[VQAExample]]
    skipped: list[SkippedItem]
    digests: dict[ImageSource, bytes]
    """SHA-256 of every picture that is there and looks like one."""
    pictures: int
    """Distinct files that the annotations name, or rows of tables."""
    sources: dict[str, dict[str, str]]
    """SHA-256 of the annotation files as they were parsed, or the identity of the tables, by split and key."""
    rescaled: set[ImageSource] = field(default_factory=set)
    """Those of more than 8 bits a channel or of float pixels: each is scaled to its own range."""
    respelled: int = 0
    """How many images were found under another spelling of their name."""

    @cached_property
    def paths(self) -> dict[bytes, ImageSource]:
        """Where each distinct picture is found, in the order of the questions."""
        images = dict.fromkeys(image for split in self.splits.values() for image in images_of(split))
        return {self.digests[image]: image for image in images}

    @property
    def rescaled_images(self) -> int:
        """How many of the distinct images are scaled to their own range."""
        return sum(image in self.rescaled for image in self.paths.values())

    def without(self, failures: dict[bytes, str]) -> "DatasetScan":
        """The same without the questions on these pictures, by digest, and the reason noted."""
        reasons = {picture: failures[digest] for picture, digest in self.digests.items() if digest in failures}
        return _skip(self, reasons) if reasons else self

    def without_questions(self, split: str, places: Mapping[int, str], reason: str) -> "DatasetScan":
        """The same without some questions of a split, by their numbers in it; `places`: where each one's record is."""
        examples, dropped = self.splits[split], set(places)
        skipped = [
            SkippedItem(split, reason, where, examples[number].question_id, str(examples[number].image))
            for number, where in places.items()
        ]
        kept = [example for number, example in enumerate(examples) if number not in dropped]
        return replace(self, splits={**self.splits, split: kept}, skipped=self.skipped + skipped)


def scan_dataset(data: DataConfig, earlier: FeatureReader | None = None) -> DatasetScan:
    """Reads the annotations of every split, and every picture once for its digest.

    What the finished cache `earlier` was made of is not parsed again, nor is a picture looked into that it has.

    Raises `PipelineError` for annotations that cannot be read, or a folder of pictures that is not there.
    """
    for split, files in data.splits.items():
        if files.images and not files.images.is_dir():
            raise PipelineError(f"{files.images} (data.{split}.images): no such folder. Is its disk mounted?")
    read, sources = {}, {}
    sizes = {split: annotation_bytes(files) for split, files in data.splits.items()}
    total = sum(sizes.values())
    delay = 0 if total > LARGE else 2
    with progress_bar("annotations", total, "B", scaled=True, delay=delay) as bar:
        for split, files in data.splits.items():
            if earlier and (unchanged := unchanged_split(earlier, data, split)):
                examples, sources[split] = unchanged
                read[split] = Split(examples, [])
            else:
                read[split], sources[split] = read_split(data.format, split, files)
            bar.update(sizes[split])
    splits = {split: found.examples for split, found in read.items()}
    skipped = [one for found in read.values() for one in found.skipped]
    wanted = dict.fromkeys(image for examples in splits.values() for image in images_of(examples))
    known = _stored_digests(earlier)
    scanned, reasons = _scan_pictures(list(wanted), known)
    absent = [picture for picture, reason in reasons.items() if isinstance(picture, Path) and reason == NOT_THERE]
    same, near = match_paths(absent)
    if same:
        splits = {split: _respelled(examples, same) for split, examples in splits.items()}
        more, reasons_of_more = _scan_pictures([path for path in same.values() if path not in scanned], known)
        scanned |= more
        reasons = {picture: why for picture, why in reasons.items() if picture not in same} | reasons_of_more
    reasons |= dict.fromkeys(near, NOT_THERE_AS_SPELLED)
    digests = {picture: digest for picture, (digest, _) in scanned.items()}
    rescaled = {picture for picture, (_, is_rescaled) in scanned.items() if is_rescaled}
    inputs = DatasetScan(splits, skipped, digests, len(digests) + len(reasons), sources, rescaled, len(same))
    return _skip(inputs, reasons, near)


def read_split(format: str, split: str, files: SplitFiles) -> tuple[Split, dict[str, str]]:
    """The split, and by key the SHA-256 of its annotation files and the identity of its tables."""
    hashed: dict[Path, str] = {}
    identities = {key: table_fingerprint(table) for key, table in files.tables.items()}  # before they are read

    def on_read(path: Path, data: bytes) -> None:
        hashed[path] = hashlib.sha256(data).hexdigest()

    found = read_examples(format, split, files.annotations, files.images, files.questions, on_read, files.tables)
    hashes = {key: hashed[path] for key, path in files if path in hashed}
    return found, hashes | {key: known for key, known in identities.items() if known}


def first_line(inputs: DatasetScan, found: WriteEstimate, config: CacheConfig) -> str:
    """What there is to do, in a line."""
    unusable = inputs.pictures - len(inputs.digests)
    counted = (
        f"{inputs.pictures} pictures, {f'{unusable} of them unusable, ' if unusable else ''}{found.wanted} distinct"
    )
    parts = [counted, f"{found.stored} in the cache already"]
    if found.copyable:
        parts.append(f"{found.copyable} to be copied from caches beside it")
    needed, free = found.bytes_needed, free_bytes(config.dir)
    return f"{'; '.join(parts)}; {found.to_encode} to encode; {size(needed)} needed, {size(free)} free"


def check_disk_space(found: WriteEstimate, config: CacheConfig) -> None:
    """Raises `PipelineError` if the disk cannot hold what is missing."""
    free = free_bytes(config.dir)
    if found.bytes_needed > free:
        missing = found.wanted - found.stored
        smaller = ", or cache.dtype=float16" if config.dtype == "float32" else ""
        raise PipelineError(
            f"{config.dir}: {missing} pictures and the text need {size(found.bytes_needed)}, the disk has "
            f"{size(free)} free. Make room, or choose another cache.dir{smaller}; nothing was begun"
        )


def log_skipped(inputs: DatasetScan, news: Sequence[SkippedItem], on_invalid: str, report: Path | None) -> None:
    """Says what is newly left out; lists all of it in `report` and raises `PipelineError` if that stops the run."""
    if not news:
        return
    empty = [split for split, examples in inputs.splits.items() if not examples]
    if on_invalid == "skip" and not empty:
        log_info(f"left out: {in_words(news)}")
        return
    listed = ""
    if report:
        _write_skipped(inputs, report)
        listed = f". All of them: {report}"
    if on_invalid == "skip":
        raise PipelineError(f"no question of {', '.join(empty)} is left: {in_words(news)}{listed}. Check data.*.images")
    raise PipelineError(
        f"cannot be used: {in_words(news)}{listed}. Mend the data, or leave these questions out with "
        "precompute.on_invalid=skip"
    )


def log_rescaled(inputs: DatasetScan) -> None:
    """Warn, in one line, of images that other programs decode otherwise."""
    if count := inputs.rescaled_images:
        first = next(image for image in inputs.paths.values() if image in inputs.rescaled)
        log_info(
            f"warning: images of more than 8 bits a channel or of float pixels: {count} (first: {first}); "
            "each is scaled to its own range, from black to white"
        )


def _write_skipped(inputs: DatasetScan, report: Path) -> None:
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_bytes(skipped_lines(inputs.skipped))
    except OSError as error:
        raise PipelineError(
            f"{report}: cannot list what is left out: {error.strerror}. What is written stays good: once that is "
            "mended, run the same command again, or choose another cache.dir"
        ) from error


def in_words(skipped: Sequence[SkippedItem]) -> str:
    """Numbers and first examples by reason; pictures first, then what is most."""
    by_reason: dict[str, list[SkippedItem]] = {}
    for one in skipped:
        by_reason.setdefault(one.reason, []).append(one)
    most = sorted(by_reason.items(), key=lambda item: (item[1][0].question_id is not None, -len(item[1])))
    lines = []
    for reason, ones in most[:MAX_NAMED]:
        named = ", ".join(map(_place, ones[:MAX_NAMED])) + (", ..." if len(ones) > MAX_NAMED else "")
        lines.append(f"{sum(one.questions for one in ones)} questions ({reason}: {named})")
    others = sum(one.questions for _, ones in most[MAX_NAMED:] for one in ones)
    return "; ".join(lines) + (f"; {others} questions for other reasons" if others else "")


def _place(one: SkippedItem) -> str:
    return (
        f"{one.question_id!r} of {one.split} at {one.where}"
        if one.reason in (DUPLICATE_ID, DUPLICATE_ANNOTATION)
        else one.where
    )


def skipped_lines(skipped: Iterable[SkippedItem]) -> bytes:
    """One JSON object a line."""
    records = ({key: value for key, value in asdict(one).items() if value is not None} for one in skipped)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(
        "utf-8", "backslashreplace"
    )


def free_bytes(folder: Path) -> int:
    """Room on the disk that holds, or would hold, `folder`."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _where(picture: ImageSource, near: Mapping[Path, Path]) -> str:
    found = near.get(picture) if isinstance(picture, Path) else None
    return f"{picture} (there is {found})" if found else str(picture)


def _scan_pictures(
    pictures: Sequence[ImageSource], known: Collection[bytes]
) -> tuple[dict[ImageSource, tuple[bytes, bool]], dict[ImageSource, str]]:
    """Digest of every picture that looks like one and whether it is rescaled, and why the others do not.

    `known`: digests of pictures whose features are stored.
    """

    def scan_all(some: Sequence[ImageSource]) -> list[tuple[bytes, bool] | str]:
        return [_scan(picture, known) for picture in some]

    scanned: dict[ImageSource, tuple[bytes, bool]] = {}
    reasons: dict[ImageSource, str] = {}
    chunks = [pictures[start : start + CHUNK_SIZE] for start in range(0, len(pictures), CHUNK_SIZE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar("reading", len(pictures), "pictures") as bar:
        for some, results in zip(chunks, pool.map(scan_all, chunks), strict=True):
            for picture, found in zip(some, results, strict=True):
                if isinstance(found, str):
                    reasons[picture] = found
                else:
                    scanned[picture] = found
            bar.update(len(some))
    return scanned, reasons


def _scan(picture: ImageSource, known: Collection[bytes]) -> tuple[bytes, bool] | str:
    try:
        data = read_image_bytes(picture)
        digest = image_digest(data)
        if digest in known and data.startswith(JPEG):
            return digest, False
        return digest, check_header(data)
    except ImageError as error:
        return str(error)


def _stored_digests(earlier: FeatureReader | None) -> frozenset[bytes]:
    """Of the pictures whose features the cache has."""
    with suppress(CacheError):  # a damaged part: it is told where the cache is opened to be written
        return frozenset(digest for digest, _ in earlier.stored()) if earlier else frozenset()
    return frozenset()


def annotation_bytes(files: SplitFiles) -> int:
    """Of the files of one split; of tables none."""
    paths = [path for path in (files.annotations, files.questions) if path and path.is_file()]
    return sum(path.stat().st_size for path in paths)


def _respelled(examples: Sequence[VQAExample], same: Mapping[Path, Path]) -> list[VQAExample]:
    return [
        replace(one, image=same[one.image]) if isinstance(one.image, Path) and one.image in same else one
        for one in examples
    ]


def _skip(
    inputs: DatasetScan, reasons: dict[ImageSource, str], near: Mapping[Path, Path] = MappingProxyType({})
) -> DatasetScan:
    """The inputs without the questions on the pictures in `reasons`; `near`: files with nearly the names of some."""
    if not reasons:
        return inputs
    skipped = list(inputs.skipped)
    for split, examples in inputs.splits.items():
        questions = Counter(example.image for example in examples if example.image in reasons)
        skipped += [
            SkippedItem(split, reasons[picture], _where(picture, near), image=str(picture), questions=count)
            for picture, count in questions.items()
        ]
    kept: dict[str, Sequence[VQAExample]] = {
        split: [example for example in examples if example.image not in reasons]
        for split, examples in inputs.splits.items()
    }
    digests = {picture: digest for picture, digest in inputs.digests.items() if picture not in reasons}
    return replace(inputs, splits=kept, skipped=skipped, digests=digests)

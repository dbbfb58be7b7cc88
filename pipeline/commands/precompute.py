"""`pipe precompute`, stage one: every distinct image passes once through the frozen encoder, into the cache."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.format import inspect_part
from cache.lock import check_not_locked
from cache.manifest import Manifest
from cache.reader import FeatureReader
from cache.spec import CacheError, CacheSpec
from cache.text import TextTable
from cache.thumbnails import thumbnails_bytes
from cache.writer import FeatureWriter
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import check_devices, pick_device
from pipeline.blip2.encoder import load_encoder
from pipeline.common.distributed import ENCODING_TIMEOUT, DistributedContext, rank
from pipeline.common.progress import log_info, log_warning
from pipeline.common.result import Result
from pipeline.config import Config, PrecomputeConfig
from pipeline.data.image_sources import ImageSource
from pipeline.data.text import log_truncated_answers, truncated_answers
from pipeline.encoding.dataset_scan import DatasetScan
from pipeline.encoding.encoding_loop import EncodingLoop, EncodingReport
from pipeline.encoding.images import Preprocessor, read_image_bytes
from pipeline.encoding.preflight import BeforeWriting, Preflight, prepare
from pipeline.encoding.provenance import build_provenance
from pipeline.encoding.skipped_items import SKIPPED_NAME, log_skipped, skipped_lines
from pipeline.encoding.thumbnails import ThumbnailWriter


@dataclass(frozen=True)
class PrecomputeResult(Result):
    """Result of `precompute`."""

    cache: str
    cache_bytes: int
    thumbnail_bytes: int
    images: int
    """Distinct images that the questions need."""
    encoded: int
    reused: int
    """Images whose features were in this cache or another one."""
    copied: int
    """Those of them that were copied from another cache."""
    failed: int
    """Images that are invalid."""
    questions: dict[str, int]
    """By split."""
    multiline_answers: dict[str, int]
    """Questions by split with answers of which only the first line is trained."""
    skipped: dict[str, int]
    """Questions by reason."""
    rescaled_images: int
    """Images with more than 8 bits per channel or float pixels."""
    time: dict[str, float]
    """Seconds by phase."""
    seconds: float
    images_per_second: float | None
    """None if nothing was encoded."""


@dataclass(frozen=True)
class PrecomputeEstimate(Result):
    """Result of `estimate_precompute`."""

    cache: str
    images_found: int
    """Distinct image files or table rows that the annotations name."""
    images: int
    """Distinct images by content."""
    reused: int
    to_encode: int
    bytes_needed: int
    skipped: dict[str, int]
    """Questions by reason."""
    rescaled_images: int
    images_per_second: float | None
    """Measured on a few images; None if nothing is to be encoded, or none of them can be decoded."""
    seconds_encoding: float | None


@dataclass(frozen=True)
class RankAssignment:
    """What one rank encodes."""

    spec: CacheSpec
    parts: list[Path]
    images: dict[bytes, ImageSource]
    """By digest."""


@dataclass(frozen=True)
class _PhaseTimes:
    """Values of `time.perf_counter` between the phases of rank 0."""

    started: float
    prepared: float
    encoded: float


def precompute(config: Config, data: Mapping[str, Any] | None = None) -> PrecomputeResult | None:
    """Encode all images that are not cached yet, and write the text of all questions, into the cache of `config`.

    An interrupted run continues where it stopped. Images that this cache or another one in the same parent folder
    contains are not encoded. Under `torchrun` each rank fills parts of its own.

    Args:
        config: the config.
        data: splits passed from Python, which replace those of the config. Each is a list of records with the fields of
            the jsonl format, `image` being a path or a `PIL.Image.Image`, or a `datasets.Dataset` with the columns of
            the hf format: `{"train": [{"image": image, "question": "what is it?", "answer": "a cat"}]}`.

    Returns:
        The result; None on ranks other than 0.

    Raises:
        PipelineError, CacheError: the data, the checkpoint or the disk has a problem. Completed work is saved.
    """
    return fill_cache(config, data)


def fill_cache(
    config: Config, data: Mapping[str, Any] | None = None, before_writing: BeforeWriting | None = None
) -> PrecomputeResult | None:
    """Run stage one like `precompute`, calling `before_writing` once everything else is validated."""
    with DistributedContext(ENCODING_TIMEOUT) as dist:
        check_devices(dist)
        if dist.rank == 0:
            return _run_main(config, data, dist, before_writing)
        _run_worker(config, dist)
        return None


def estimate_precompute(config: Config, data: Mapping[str, Any] | None = None) -> PrecomputeEstimate | None:
    """Estimate what `precompute` would do and how long it would take, without changing the cache.

    Returns:
        The estimate; None on ranks other than 0.
    """
    if rank() > 0:
        return None
    preflight = prepare(config, data, report=None)
    scan, estimate = preflight.scan, preflight.estimate
    speed = None
    if estimate.to_encode:
        loop = _encoding_loop(preflight.checkpoint, preflight.spec, config.precompute)
        speed = loop.images_per_second([scan.images[digest] for digest in estimate.missing])
    seconds = estimate.to_encode / speed if speed else None
    return PrecomputeEstimate(
        cache=str(config.cache.dir),
        images_found=scan.num_images,
        images=estimate.wanted,
        reused=estimate.stored + estimate.copyable,
        to_encode=estimate.to_encode,
        bytes_needed=estimate.bytes_needed,
        skipped=scan.skipped_by_reason,
        rescaled_images=scan.num_rescaled,
        images_per_second=speed,
        seconds_encoding=seconds if estimate.to_encode else 0.0,
    )


def _run_main(
    config: Config,
    data: Mapping[str, Any] | None,
    dist: DistributedContext,
    before_writing: BeforeWriting | None,
) -> PrecomputeResult:
    """Run rank 0: prepare, assign the parts to the ranks, encode its own, and finish the cache."""
    started = time.perf_counter()
    check_not_locked(config.cache.dir)
    preflight = prepare(config, data, _report_path(config), before_writing)
    images = preflight.scan.images
    with (
        FeatureWriter(
            config.cache.dir, preflight.spec, list(images), config.cache.part_rows, preflight.siblings, config.cache.io
        ) as writer,
        _write_thumbnails(config, writer, images) as thumbnails,
    ):
        assignments = _assign_parts(writer.parts, preflight.spec, images, dist.world_size)
        assignment = dist.scatter(assignments)
        prepared = time.perf_counter()
        reports = dist.gather(_encode(assignment, preflight.checkpoint, config.precompute))
        times = _PhaseTimes(started, prepared, time.perf_counter())
        scan = _without_failed_images(config, preflight.scan, reports)
        texts = preflight.final_texts(scan, writer.rows())
        multiline = _count_truncated_answers(preflight, texts)
        _log_dropped_splits(config.cache.dir, texts)
        attachments = {SKIPPED_NAME: skipped_lines(scan.skipped)} if scan.skipped else {}
        writer.finish(texts, attachments, build_provenance(config, preflight.checkpoint, scan), thumbnails.wait())
    _report_path(config).unlink(missing_ok=True)
    if scan.skipped:
        log_info(f"list of skipped questions: {FeatureReader(config.cache.dir).attachment(SKIPPED_NAME)}")
    return _result(config.cache.dir, scan, reports, texts, multiline, writer.copied, times)


def _run_worker(config: Config, dist: DistributedContext) -> None:
    """Run another rank: receive an assignment from rank 0, and encode it."""
    assignment: RankAssignment = dist.scatter()  # first, since rank 0 reports the problems of the checkpoint
    checkpoint = fetch_checkpoint(config.model.checkpoint, config.model.revision, ENCODER_PREFIXES)
    dist.gather(_encode(assignment, checkpoint, config.precompute))


def _write_thumbnails(config: Config, writer: FeatureWriter, images: Mapping[bytes, ImageSource]) -> ThumbnailWriter:
    return ThumbnailWriter(
        config.cache.dir,
        writer.images(),
        lambda digest: read_image_bytes(images[digest]) if digest in images else None,
        config.precompute.thumbnail_size,
        max(1, config.precompute.num_workers),
    )


def _assign_parts(
    parts: Sequence[Path], spec: CacheSpec, images: Mapping[bytes, ImageSource], world_size: int
) -> list[RankAssignment]:
    """Distribute the parts over the ranks, with the images of each part."""
    assignments = []
    for number in range(world_size):
        own = list(parts[number::world_size])
        digests = {digest.tobytes() for path in own for digest in inspect_part(path).digests}
        assignments.append(
            RankAssignment(spec, own, {digest: images[digest] for digest in digests if digest in images})
        )
    return assignments


def _encode(assignment: RankAssignment, checkpoint: Path, settings: PrecomputeConfig) -> EncodingReport:
    if not assignment.parts:
        return EncodingReport()
    return _encoding_loop(checkpoint, assignment.spec, settings).fill(assignment.parts, assignment.images)


def _encoding_loop(checkpoint: Path, spec: CacheSpec, settings: PrecomputeConfig) -> EncodingLoop:
    encoder = load_encoder(checkpoint, pick_device(), getattr(torch, spec.encoder_dtype))
    if settings.compile:
        encoder.compile(dynamic=False)  # there are at most two shapes: a full batch, and the last one of a part
    return EncodingLoop(encoder, Preprocessor(checkpoint), settings.batch_size, settings.num_workers)


def _without_failed_images(config: Config, scan: DatasetScan, reports: Sequence[EncodingReport]) -> DatasetScan:
    """Return the scan without the images that could not be encoded; log them, or stop the run."""
    failures = {digest: reason for report in reports for digest, reason in report.failures.items()}
    remaining = scan.without_images(failures)
    new = remaining.skipped[len(scan.skipped) :]
    log_skipped(remaining, new, config.precompute.on_invalid, _report_path(config))
    return remaining


def _count_truncated_answers(preflight: Preflight, texts: Mapping[str, TextTable]) -> dict[str, int]:
    """Count, and log, the questions of each split with answers that cannot be trained as a whole."""
    counts = {split: len(truncated_answers(text, preflight.tokenizer)) for split, text in texts.items()}
    for split, count in counts.items():
        log_truncated_answers(split, count, preflight.tokenizer)
    return counts


def _log_dropped_splits(folder: Path, texts: Mapping[str, TextTable]) -> None:
    """Warn about splits of the existing cache that this config does not name."""
    with suppress(CacheError):
        dropped = [split for split in Manifest.load(folder).splits if split not in texts]
        if dropped:
            log_warning(f"{folder}: splits {', '.join(dropped)} of the earlier config are no longer in the cache")


def _report_path(config: Config) -> Path:
    """Return the file that lists the skipped items if they stop the run; a finished cache contains the list."""
    folder = config.cache.dir if config.cache.dir.name else config.cache.dir.absolute()  # "." has no name
    return folder.parent / f"{folder.name}.{SKIPPED_NAME}"


def _result(
    folder: Path,
    scan: DatasetScan,
    reports: Sequence[EncodingReport],
    texts: Mapping[str, TextTable],
    multiline: dict[str, int],
    copied: int,
    times: _PhaseTimes,
) -> PrecomputeResult:
    encoded = sum(report.rows for report in reports)
    loop_seconds = max(report.seconds for report in reports)
    finished = time.perf_counter()
    return PrecomputeResult(
        cache=str(folder),
        cache_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        thumbnail_bytes=thumbnails_bytes(folder, Manifest.load(folder)),
        images=len(scan.images),
        encoded=encoded,
        reused=len(scan.images) - encoded,
        copied=copied,
        failed=scan.num_invalid,
        questions={split: len(text) for split, text in texts.items()},
        multiline_answers=multiline,
        skipped=scan.skipped_by_reason,
        rescaled_images=scan.num_rescaled,
        time={
            "preparing": times.prepared - times.started,
            "loading_encoder": times.encoded - times.prepared - loop_seconds,
            "waiting_for_images": sum(report.waiting_for_images for report in reports) / len(reports),
            "encoding": sum(report.encoding for report in reports) / len(reports),
            "waiting_for_disk": sum(report.waiting_for_disk for report in reports) / len(reports),
            "finishing": finished - times.encoded,
        },
        seconds=finished - times.started,
        images_per_second=encoded / loop_seconds if encoded else None,
    )

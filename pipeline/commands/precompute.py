"""Stage one: read -> encode -> write. Every distinct picture goes once through the frozen encoder."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.estimate import WriteEstimate, estimate_write
from cache.format import inspect_part
from cache.lock import check_not_locked
from cache.manifest import Manifest
from cache.ownership import check_usable
from cache.reader import FeatureReader
from cache.reuse import sibling_caches
from cache.spec import CacheError, CacheSpec
from cache.text import TEXT_HEAD_BYTES, TextTable
from cache.thumbnails import thumbnails_bytes
from cache.writer import FeatureWriter
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint, fetch_small_files
from pipeline.blip2.device import check_devices, dtype_name, pick_device, pick_dtype
from pipeline.blip2.encoder import load_encoder
from pipeline.common.distributed import ENCODING_TIMEOUT, DistributedContext, rank
from pipeline.common.progress import log_info
from pipeline.config import Config, PrecomputeConfig
from pipeline.data.cached_examples import CachedExamples, images_of, reader_fingerprint
from pipeline.data.examples import VQAExample
from pipeline.data.sequence_length import find_too_long, too_long_reason
from pipeline.data.tables import ImageSource
from pipeline.data.text import PromptTokenizer, log_truncated_answers, select, tokenize, truncated_answers
from pipeline.encoding.encoder_spec import encoder_settings, encoder_spec, load_preprocessor
from pipeline.encoding.encoding_loop import LOOP_TIMES, EncodingLoop, EncodingReport
from pipeline.encoding.images import Preprocessor, read_image_bytes
from pipeline.encoding.preflight import (
    SKIPPED_NAME,
    DatasetScan,
    check_disk_space,
    first_line,
    log_rescaled,
    log_skipped,
    read_split,
    scan_dataset,
    skipped_lines,
)
from pipeline.encoding.thumbnails import making_thumbnails, max_thumbnail_bytes

Mend = Callable[[DatasetScan, CacheSpec], None]


@dataclass(frozen=True)
class Prepared:
    """All that is known before the encoder is loaded."""

    inputs: DatasetScan
    tokenizer: PromptTokenizer
    texts: dict[str, TextTable]
    """By split; the rows of the images are not known yet."""
    checkpoint: Path
    spec: CacheSpec
    beside: list[Path]
    """Caches to copy rows from."""
    found: WriteEstimate


@dataclass(frozen=True)
class Share:
    """What one process encodes."""

    spec: CacheSpec
    parts: list[Path]
    pictures: dict[bytes, ImageSource]
    """By digest, of what is to be encoded."""


def precompute(config: Config, mend: Mend | None = None) -> dict[str, Any] | None:
    """Fill the cache that `config` names, and return the summary; None in a process that only helps.

    Goes on where an earlier run stopped, encodes only pictures that neither the cache nor one beside it has, and makes
    only tokens that it lacks. Under `torchrun` each process fills parts of its own. `mend` is called when the data
    set and the checkpoint are found to be good, before the cache is looked into. Raises `PipelineError` or
    `CacheError`; what is written stays good.
    """
    with DistributedContext(ENCODING_TIMEOUT) as dist:
        check_devices(dist)
        if dist.rank == 0:
            return _run_main(config, dist, mend)
        _run_worker(config, dist)
        return None


def estimate_precompute(config: Config) -> dict[str, Any] | None:
    """What `precompute` would do, how long it would take, and what it would leave out; the cache stays as it is.

    None in a process that is not the first.
    """
    if rank() > 0:
        return None
    prepared = _prepare(config, report=None)
    found, settings = prepared.found, config.precompute
    a_second = None
    if found.to_encode:
        encoder = _picture_encoder(prepared.checkpoint, prepared.spec, settings)
        a_second = encoder.images_per_second([prepared.inputs.paths[digest] for digest in found.missing])
    return {
        "cache": str(config.cache.dir),
        "pictures": prepared.inputs.pictures,
        "images": found.wanted,
        "reused": found.stored + found.copyable,
        "to_encode": found.to_encode,
        "bytes_needed": found.bytes_needed,
        "skipped": _reasons(prepared.inputs),
        "rescaled_images": prepared.inputs.rescaled_images,
        "images_per_second": a_second,
        "seconds_encoding": found.to_encode / a_second if a_second else None if found.to_encode else 0.0,
    }


def _run_main(config: Config, dist: DistributedContext, mend: Mend | None) -> dict[str, Any]:
    """Process 0: prepares, takes its share, and finishes."""
    started = time.perf_counter()
    check_not_locked(config.cache.dir)
    prepared = _prepare(config, _report(config), mend)
    inputs, spec = prepared.inputs, prepared.spec
    cache, beside = config.cache, prepared.beside
    pictures = inputs.paths
    with (
        FeatureWriter(cache.dir, spec, list(pictures), cache.part_rows, beside, cache.io) as writer,
        making_thumbnails(
            cache.dir,
            writer.images(),
            lambda digest: read_image_bytes(pictures[digest]) if digest in pictures else None,
            config.precompute.thumbnail_size,
            max(1, config.precompute.num_workers),
        ) as thumbnails,
    ):
        share = dist.scatter(_shares(writer.parts, spec, pictures, dist.world_size))
        prepared_at = time.perf_counter()
        reports = dist.gather(_encode(share, prepared.checkpoint, config.precompute))
        encoded_at = time.perf_counter()
        failures = {digest: why for report in reports for digest, why in report.failures.items()}
        if failures:
            inputs = inputs.without(failures)
            news = inputs.skipped[len(prepared.inputs.skipped) :]
            log_skipped(inputs, news, config.precompute.on_invalid, _report(config))
        texts = _texts(prepared, inputs, writer.rows())
        multiline = {split: len(truncated_answers(text, prepared.tokenizer)) for split, text in texts.items()}
        for split, count in multiline.items():
            log_truncated_answers(split, count, prepared.tokenizer)
        _tell_dropped(config.cache.dir, texts)
        provenance = _provenance(config, prepared.checkpoint, inputs)
        writer.finish(texts, _attachments(inputs), provenance, thumbnails())
    _report(config).unlink(missing_ok=True)
    if inputs.skipped:
        log_info(f"all that was left out: {FeatureReader(config.cache.dir).attachment(SKIPPED_NAME)}")
    encoded = sum(report.rows for report in reports)
    loop_seconds = max(report.seconds for report in reports)
    return {
        "cache": str(config.cache.dir),
        "cache_bytes": sum(file.stat().st_size for file in config.cache.dir.iterdir()),
        "thumbnail_bytes": thumbnails_bytes(config.cache.dir, Manifest.load(config.cache.dir)),
        "images": len(inputs.paths),
        "encoded": encoded,
        "reused": len(inputs.paths) - encoded,
        "copied": writer.copied,
        "failed": inputs.pictures - len(inputs.digests),
        "questions": {split: len(text) for split, text in texts.items()},
        "multiline_answers": multiline,
        "skipped": _reasons(inputs),
        "rescaled_images": inputs.rescaled_images,
        "time": {
            "preparing": prepared_at - started,
            "loading_encoder": encoded_at - prepared_at - loop_seconds,
            **{name: sum(getattr(report, name) for report in reports) / len(reports) for name in LOOP_TIMES},
            "finishing": time.perf_counter() - encoded_at,
        },
        "seconds": time.perf_counter() - started,
        "images_per_second": encoded / loop_seconds if encoded else None,
    }


def _run_worker(config: Config, dist: DistributedContext) -> None:
    """A process that is not 0: encodes its share."""
    share: Share = dist.scatter()  # first: what is wrong with the checkpoint, process 0 has said
    checkpoint = fetch_checkpoint(config.model.checkpoint, config.model.revision, ENCODER_PREFIXES)
    dist.gather(_encode(share, checkpoint, config.precompute))


def _prepare(config: Config, report: Path | None, mend: Mend | None = None) -> Prepared:
    """Everything that can go wrong before the long work, in order of its cost."""
    check_usable(config.cache.dir)
    model = config.model
    small_files = fetch_small_files(model.checkpoint, model.revision, ENCODER_PREFIXES)
    tokenizer = PromptTokenizer(small_files, config.data.prompt)
    load_preprocessor(small_files)  # raises what is wrong with it
    earlier = _finished_cache(config.cache.dir)
    inputs = scan_dataset(config.data, earlier)
    log_skipped(inputs, inputs.skipped, config.precompute.on_invalid, report)
    log_rescaled(inputs)
    told = len(inputs.skipped)
    checkpoint = fetch_checkpoint(model.checkpoint, model.revision, ENCODER_PREFIXES)
    inputs, texts = _tokenize(config, inputs, tokenizer, earlier)
    if earlier:
        earlier.close()  # a repair takes rows out, which it may not while the cache is read
    log_skipped(inputs, inputs.skipped[told:], config.precompute.on_invalid, report)
    dtype = pick_dtype(config.precompute.dtype, pick_device())
    spec = encoder_spec(checkpoint, dtype_name(dtype), config.cache.dtype)
    if mend:
        mend(inputs, spec)
    beside = sibling_caches(config.cache.dir, spec)
    found = estimate_write(config.cache.dir, spec, list(inputs.paths), beside, config.cache.part_rows)
    text_bytes = sum(text.nbytes + TEXT_HEAD_BYTES for text in texts.values())
    shown_bytes = (found.wanted - found.stored) * max_thumbnail_bytes(config.precompute.thumbnail_size)
    found = replace(found, bytes_needed=found.bytes_needed + text_bytes + shown_bytes)
    log_info(first_line(inputs, found, config.cache))
    check_disk_space(found, config.cache)
    return Prepared(inputs, tokenizer, texts, checkpoint, spec, beside, found)


def _tokenize(
    config: Config, inputs: DatasetScan, tokenizer: PromptTokenizer, earlier: FeatureReader | None
) -> tuple[DatasetScan, dict[str, TextTable]]:
    """The text of each split, tokens of an earlier run taken over, and the inputs without questions too long for it."""
    texts = {}
    for split, examples in inputs.splits.items():
        there = examples.text if isinstance(examples, CachedExamples) else _earlier_text(earlier, split)
        text = tokenize(examples, np.zeros(len(examples)), tokenizer, there)
        if long := find_too_long(examples, text, tokenizer, config, split):
            places = _places(config, split, examples, long)
            inputs = inputs.without_questions(split, places, too_long_reason(tokenizer))
            text = select(text, np.setdiff1d(np.arange(len(text)), long))
        texts[split] = text
    return inputs, texts


def _places(config: Config, split: str, examples: Sequence[VQAExample], numbers: Sequence[int]) -> dict[int, str]:
    """Where the records of some questions are; to tell that, those from a cache are read anew."""
    if isinstance(examples, CachedExamples):
        examples = read_split(config.data.format, split, config.data.splits[split])[0].examples
    return {number: examples[number].where or "" for number in numbers}


def _finished_cache(folder: Path) -> FeatureReader | None:
    with suppress(CacheError):  # none, or a damaged one: that is told where it is opened to be written
        return FeatureReader(folder)
    return None


def _earlier_text(earlier: FeatureReader | None, split: str) -> TextTable | None:
    with suppress(CacheError):  # none, or damaged: it is made anew
        return earlier.text(split) if earlier else None
    return None


def _shares(parts: Sequence[Path], spec: CacheSpec, pictures: dict[bytes, ImageSource], processes: int) -> list[Share]:
    """The parts dealt out, and of the pictures only those that each process encodes."""
    shares = []
    for process in range(processes):
        mine = list(parts[process::processes])
        digests = {digest.tobytes() for path in mine for digest in inspect_part(path).digests}
        shares.append(Share(spec, mine, {digest: pictures[digest] for digest in digests if digest in pictures}))
    return shares


def _encode(share: Share, checkpoint: Path, settings: PrecomputeConfig) -> EncodingReport:
    if not share.parts:
        return EncodingReport()
    return _picture_encoder(checkpoint, share.spec, settings).fill(share.parts, share.pictures)


def _picture_encoder(checkpoint: Path, spec: CacheSpec, settings: PrecomputeConfig) -> EncodingLoop:
    encoder = load_encoder(checkpoint, pick_device(), getattr(torch, spec.encoder_dtype))
    if settings.compile:
        encoder.compile(dynamic=False)  # there are two shapes at most: a full batch, and the last one of a part
    return EncodingLoop(encoder, Preprocessor(checkpoint), settings.batch_size, settings.num_workers)


def _texts(prepared: Prepared, inputs: DatasetScan, rows: dict[bytes, int]) -> dict[str, TextTable]:
    """The text of each split with the rows of its images; made again if pictures failed meanwhile."""
    texts = {}
    for split, examples in inputs.splits.items():
        image_row = np.array([rows[inputs.digests[image]] for image in images_of(examples)], np.int64)
        if len(examples) == len(prepared.texts[split]):
            texts[split] = replace(prepared.texts[split], image_row=image_row)
        else:
            texts[split] = tokenize(examples, image_row, prepared.tokenizer, prepared.texts[split])
    return texts


def _tell_dropped(folder: Path, texts: Mapping[str, TextTable]) -> None:
    """Of splits that an earlier config put there and this one does not name."""
    with suppress(CacheError):
        dropped = [split for split in Manifest.load(folder).splits if split not in texts]
        if dropped:
            log_info(f"{folder}: splits {', '.join(dropped)} of the earlier config are no longer in the cache")


def _report(config: Config) -> Path:
    """Where it is listed what cannot be used if that stops the run: no cache holds the list then."""
    folder = config.cache.dir if config.cache.dir.name else config.cache.dir.absolute()  # "." has no name
    return folder.parent / f"{folder.name}.{SKIPPED_NAME}"


def _attachments(inputs: DatasetScan) -> dict[str, bytes]:
    return {SKIPPED_NAME: skipped_lines(inputs.skipped)} if inputs.skipped else {}


def _reasons(inputs: DatasetScan) -> dict[str, int]:
    """Questions left out, by reason."""
    counts: Counter[str] = Counter()
    for one in inputs.skipped:
        counts[one.reason] += one.questions
    return dict(counts)


def _provenance(config: Config, checkpoint: Path, inputs: DatasetScan) -> dict[str, Any]:
    """What made the cache: enough to repair it, and to notice that the annotations have changed since."""
    kept: Any = {"model": True, "data": True, "precompute": True, "cache": {"dtype", "part_rows"}}
    used = config.with_absolute_paths().model_dump(mode="json", include=kept)
    return {
        "config": used,
        "encoder": encoder_settings(checkpoint),
        "sources": inputs.sources,
        "reader": reader_fingerprint(),
        "skipped": _reasons(inputs),
        "respelled": inputs.respelled,
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
    }

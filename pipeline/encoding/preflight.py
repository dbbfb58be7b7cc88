"""Prepare stage one: find every problem, in order of cost, before the encoder is loaded."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.estimate import WriteEstimate, estimate_write
from cache.ownership import check_usable
from cache.reader import FeatureReader
from cache.reuse import sibling_caches
from cache.spec import CacheError, CacheSpec
from cache.text import TEXT_HEAD_BYTES, TextTable
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint, fetch_small_files
from pipeline.blip2.device import dtype_name, pick_device, pick_dtype
from pipeline.common.progress import log_info
from pipeline.config import Config
from pipeline.data.cached_examples import CachedExamples, images_of
from pipeline.data.examples import VQAExample
from pipeline.data.in_memory import normalize_data
from pipeline.data.sequence_length import find_too_long, too_long_reason
from pipeline.data.text import PromptTokenizer, select, tokenize
from pipeline.encoding.dataset_scan import DatasetScan, read_split, scan_dataset
from pipeline.encoding.disk_space import check_disk_space, format_bytes, free_disk_bytes
from pipeline.encoding.encoder_spec import encoder_spec, load_preprocessor
from pipeline.encoding.skipped_items import log_rescaled, log_skipped
from pipeline.encoding.thumbnails import max_thumbnail_bytes

BeforeWriting = Callable[[DatasetScan, CacheSpec], None]
"""Called after the dataset and the checkpoint are validated, before the cache is opened."""


@dataclass(frozen=True)
class Preflight:
    """Everything known before the encoder is loaded."""

    scan: DatasetScan
    tokenizer: PromptTokenizer
    texts: dict[str, TextTable]
    """By split; the image rows are not known yet."""
    checkpoint: Path
    spec: CacheSpec
    siblings: list[Path]
    """Caches to copy rows from."""
    estimate: WriteEstimate

    def final_texts(self, scan: DatasetScan, rows: Mapping[bytes, int]) -> dict[str, TextTable]:
        """Return the text of each split of the final scan, with the cache rows of its images by digest.

        Splits that lost questions since are tokenized again.
        """
        texts = {}
        for split, examples in scan.splits.items():
            image_row = np.array([rows[scan.digests[image]] for image in images_of(examples)], np.int64)
            if len(examples) == len(self.texts[split]):
                texts[split] = replace(self.texts[split], image_row=image_row)
            else:
                texts[split] = tokenize(examples, image_row, self.tokenizer, self.texts[split])
        return texts


def prepare(
    config: Config,
    data: Mapping[str, Any] | None,
    report: Path | None,
    before_writing: BeforeWriting | None = None,
) -> Preflight:
    """Read the dataset, validate it and the checkpoint, and check the disk space.

    Args:
        config: the config.
        data: splits passed from Python.
        report: file for the list of skipped items if the run stops.
        before_writing: see `BeforeWriting`.

    Raises:
        PipelineError, CacheError: a problem that would stop the run later.
    """
    in_memory = normalize_data(data)
    check_usable(config.cache.dir)
    model, on_invalid = config.model, config.precompute.on_invalid
    small_files = fetch_small_files(model.checkpoint, model.revision, ENCODER_PREFIXES)
    tokenizer = PromptTokenizer(small_files, config.data.prompt)
    load_preprocessor(small_files)  # only validated here
    earlier = _open_finished(config.cache.dir)
    scan = scan_dataset(config.data, earlier, in_memory)
    log_skipped(scan, scan.skipped, on_invalid, report)
    log_rescaled(scan)
    num_logged = len(scan.skipped)
    checkpoint = fetch_checkpoint(model.checkpoint, model.revision, ENCODER_PREFIXES)
    scan, texts = _tokenize_splits(config, scan, tokenizer, earlier)
    if earlier:
        earlier.close()  # a repair removes rows, which is not possible while the cache is open for reading
    log_skipped(scan, scan.skipped[num_logged:], on_invalid, report)
    encoder_dtype = pick_dtype(config.precompute.dtype, pick_device())
    spec = encoder_spec(checkpoint, dtype_name(encoder_dtype), config.cache.dtype)
    if before_writing:
        before_writing(scan, spec)
    siblings = sibling_caches(config.cache.dir, spec)
    estimate = _estimate(config, scan, spec, siblings, texts)
    log_info(_describe_work(scan, estimate, config.cache.dir))
    check_disk_space(estimate, config.cache)
    return Preflight(scan, tokenizer, texts, checkpoint, spec, siblings, estimate)


def _estimate(
    config: Config, scan: DatasetScan, spec: CacheSpec, siblings: list[Path], texts: Mapping[str, TextTable]
) -> WriteEstimate:
    """Estimate what the run will write, text and thumbnails included."""
    estimate = estimate_write(config.cache.dir, spec, list(scan.images), siblings, config.cache.part_rows)
    text_bytes = sum(text.nbytes + TEXT_HEAD_BYTES for text in texts.values())
    thumbnail_bytes = (estimate.wanted - estimate.stored) * max_thumbnail_bytes(config.precompute.thumbnail_size)
    return replace(estimate, bytes_needed=estimate.bytes_needed + text_bytes + thumbnail_bytes)


def _describe_work(scan: DatasetScan, estimate: WriteEstimate, folder: Path) -> str:
    invalid = f"{scan.num_invalid} of them invalid, " if scan.num_invalid else ""
    parts = [f"{scan.num_images} images, {invalid}{estimate.wanted} distinct", f"{estimate.stored} already cached"]
    if estimate.copyable:
        parts.append(f"{estimate.copyable} to copy from other caches")
    parts.append(f"{estimate.to_encode} to encode")
    needed, free = format_bytes(estimate.bytes_needed), format_bytes(free_disk_bytes(folder))
    return f"{'; '.join(parts)}; disk space: {needed} needed, {free} free"


def _tokenize_splits(
    config: Config, scan: DatasetScan, tokenizer: PromptTokenizer, earlier: FeatureReader | None
) -> tuple[DatasetScan, dict[str, TextTable]]:
    """Return the scan without the questions that are too long, and the text of each split.

    Tokens of an earlier run are reused.
    """
    texts = {}
    for split, examples in scan.splits.items():
        cached = examples.text if isinstance(examples, CachedExamples) else _cached_text(earlier, split)
        text = tokenize(examples, np.zeros(len(examples)), tokenizer, cached)
        if too_long := find_too_long(examples, text, tokenizer, config, split):
            positions = _positions(config, split, examples, too_long)
            scan = scan.without_questions(split, positions, too_long_reason(tokenizer))
            text = select(text, np.setdiff1d(np.arange(len(text)), too_long))
        texts[split] = text
    return scan, texts


def _positions(config: Config, split: str, examples: Sequence[VQAExample], rows: Sequence[int]) -> dict[int, str]:
    """Return the positions of some records; cached examples have none, so their files are parsed."""
    if isinstance(examples, CachedExamples):
        examples = read_split(config.data.format, split, config.data.splits[split])[0].examples
    return {row: examples[row].where or "" for row in rows}


def _open_finished(folder: Path) -> FeatureReader | None:
    with suppress(CacheError):  # none, or a damaged one, which is reported when it is opened for writing
        return FeatureReader(folder)
    return None


def _cached_text(earlier: FeatureReader | None, split: str) -> TextTable | None:
    with suppress(CacheError):  # none, or damaged: it is created again
        return earlier.text(split) if earlier else None
    return None

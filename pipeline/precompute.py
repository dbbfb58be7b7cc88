"""Stage one: read -> encode -> write. Every distinct picture goes once through the frozen encoder."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.spec import CacheSpec
from cache.writer import FeatureWriter
from pipeline.checkpoint import ENCODER_HALF, fetch_checkpoint
from pipeline.config import Config, DataConfig, PrecomputeConfig
from pipeline.device import dtype_name, pick_device, pick_dtype, refuse_several_processes
from pipeline.encoder import load_encoder
from pipeline.errors import PipelineError
from pipeline.identity import encoder_spec
from pipeline.images import Preprocessor, image_digest, load_batches
from pipeline.progress import progress_bar, say
from pipeline.text import PromptTokenizer, tokenize
from pipeline.vqa import VQAExample, read_examples

PATHS_NAMED = 3  # of the missing pictures, in an error


def precompute(config: Config) -> dict[str, Any]:
    """Fill the cache that `config` names, and return the summary.

    Goes on where an earlier run stopped, encodes only pictures that are not in the cache yet, and remakes
    the text each time. Raises `PipelineError` or `CacheError`; what is written stays good.
    """
    refuse_several_processes()
    started = time.perf_counter()
    splits = read_splits(config.data)
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, ENCODER_HALF)
    digests = _digest_pictures({example.image for examples in splits.values() for example in examples})
    splits, missing = _drop_missing(splits, digests, config.precompute.on_missing)

    paths = {digests[example.image]: example.image for examples in splits.values() for example in examples}
    tokenizer = PromptTokenizer(folder, config.data.prompt)
    # Before the long work, so that what is wrong with the text is told first; the rows are known after it.
    texts = {split: tokenize(examples, [0] * len(examples), tokenizer) for split, examples in splits.items()}
    dtype = pick_dtype(config.precompute.dtype, pick_device())
    spec = encoder_spec(folder, dtype_name(dtype), config.cache.dtype)
    with FeatureWriter(config.cache.dir, spec, list(paths), config.cache.part_rows) as writer:
        to_encode = len(writer.pending)
        say(f"{len(paths)} distinct pictures, {writer.reused} of them in the cache already")
        encoding_started = time.perf_counter()
        if to_encode:
            _encode(writer, paths, folder, config.precompute)
        encoding_seconds = time.perf_counter() - encoding_started
        texts = {
            split: replace(text, image_row=np.array([writer.rows[digests[e.image]] for e in splits[split]], np.int64))
            for split, text in texts.items()
        }
        writer.finish(texts, {"checkpoint": config.model.checkpoint, "revision": config.model.revision or ""})
    return {
        "cache": str(config.cache.dir),
        "cache_bytes": sum(file.stat().st_size for file in config.cache.dir.iterdir()),
        "images": len(paths),
        "encoded": to_encode,
        "reused": len(paths) - to_encode,
        "failed": missing,
        "questions": {split: len(text) for split, text in texts.items()},
        "seconds": time.perf_counter() - started,
        "images_per_second": to_encode / encoding_seconds if to_encode else None,
    }


def read_splits(data: DataConfig) -> dict[str, list[VQAExample]]:
    """The examples of every split that the config names."""
    return {
        split: read_examples(data.format, split, files.annotations, files.images, files.questions)
        for split, files in data.splits.items()
    }


def _digest_pictures(paths: set[Path]) -> dict[Path, bytes]:
    """Digest of every picture that is there; those that are not are left out."""
    ordered = sorted(paths)
    found: dict[Path, bytes] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar("reading", len(ordered), "pictures") as bar:
        for path, digest in zip(ordered, pool.map(_digest_or_none, ordered), strict=True):
            if digest is not None:
                found[path] = digest
            bar.update()
    return found


def _digest_or_none(path: Path) -> bytes | None:
    try:
        return image_digest(path)
    except OSError:
        return None


def _drop_missing(
    splits: dict[str, list[VQAExample]], digests: dict[Path, bytes], on_missing: str
) -> tuple[dict[str, list[VQAExample]], int]:
    """The splits without questions on missing pictures, and the number of these pictures; or an error."""
    missing = sorted({e.image for examples in splits.values() for e in examples if e.image not in digests})
    if not missing:
        return splits, 0
    named = ", ".join(str(path) for path in missing[:PATHS_NAMED]) + (", ..." if len(missing) > PATHS_NAMED else "")
    kept = {split: [e for e in examples if e.image in digests] for split, examples in splits.items()}
    lost = sum(map(len, splits.values())) - sum(map(len, kept.values()))
    if on_missing == "error" or not digests:
        raise PipelineError(
            f"{len(missing)} pictures of {lost} questions are not there or not readable: {named}. "
            "Check data.*.images, or leave those questions out with precompute.on_missing=skip"
        )
    say(f"left out: {lost} questions on {len(missing)} pictures that are not there or not readable: {named}")
    return kept, len(missing)


def _encode(writer: FeatureWriter, paths: dict[bytes, Path], folder: Path, settings: PrecomputeConfig) -> None:
    """Encode and write what is pending, batch by batch."""
    pending, done = list(writer.pending), 0
    device, storage = pick_device(), getattr(torch, writer.spec.dtype)
    encoder = load_encoder(folder, device, getattr(torch, writer.spec.encoder_dtype))
    pictures = [paths[digest] for digest in pending]
    batches = load_batches(pictures, Preprocessor(folder), settings.batch_size, settings.num_workers)
    with progress_bar("encoding", len(pending), "pictures") as bar, torch.inference_mode():
        for pixel_values in batches:
            features = encoder(pixel_values.to(device)).to(storage).cpu()
            writer.write(pending[done : done + len(features)], _as_numpy(features, writer.spec))
            done += len(features)
            bar.update(len(features))


def _as_numpy(features: Tensor, spec: CacheSpec) -> np.ndarray:
    """The tensor as numpy stores it: bfloat16, which numpy lacks, as uint16."""
    return (features.view(torch.uint16) if spec.dtype == "bfloat16" else features).numpy()

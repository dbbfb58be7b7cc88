"""Encoding rows of a cache again: to mend damaged ones, or to see whether they come out as they are stored."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import audit
from cache.format import inspect_part
from cache.lock import exclude_readers
from cache.manifest import Manifest
from cache.reader import FeatureReader
from cache.repair import drop_damaged
from cache.spec import CacheError, CacheSpec
from cache.text import TextTable
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device
from pipeline.blip2.encoder import load_encoder
from pipeline.commands.precompute import precompute
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, progress_bar
from pipeline.config import Config, load_config
from pipeline.data.tables import ImageSource
from pipeline.encoding.encoder_spec import encoder_spec
from pipeline.encoding.images import ImageError, Preprocessor, image_digest, read_image_bytes
from pipeline.encoding.preflight import MAX_NAMED, DatasetScan, read_split
from pipeline.encoding.upkeep import cache_folder, in_words

# How far apart two machines, or two batches, may be, as a share of the largest number of a row: far above what the
# rounding of all layers adds up to, far below what another encoder makes.
_APART = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def repair(cache: Path) -> dict[str, Any]:
    """Takes damaged rows out of a cache and encodes them again, those that are not stored too; nothing else is encoded.

    The config is the one that the cache was made with, or `cache` itself if that is a config. Raises `CacheError`,
    `PipelineError`; nothing is taken out before all of the cache could be read and the pictures are found to be there
    as they were.
    """
    folder = cache_folder(cache)
    damages = audit.verify(folder).damage
    if not damages:
        return {"cache": str(folder), "damaged": [], "encoded": 0}
    if unreadable := [in_words(damage) for damage in damages if damage.unreadable]:
        raise PipelineError(f"{folder}: cannot be read, so nothing was changed: {'; '.join(unreadable)}")
    with exclude_readers(folder, "repair"):  # known before the pictures are looked for
        pass
    for damage in damages:
        if damage.problem == audit.NOT_A_PART:
            raise CacheError(f"{folder / damage.file}: {damage.problem}, and run `pipe cache repair` again")

    def mend(inputs: DatasetScan, spec: CacheSpec) -> None:
        _require_same_encoder(folder, spec)
        _require_pictures(folder, damages, inputs)
        log_info(f"{folder}: {drop_damaged(folder, damages)} damaged rows taken out")

    made = precompute(load_config(cache) if cache.is_file() else _config_of(folder), mend) or {}
    return {
        "cache": str(folder),
        "repaired": [in_words(damage) for damage in damages],
        "encoded": made["encoded"],
        "reused": made["reused"],
        "failed": made["failed"],
    }


def reencode(folder: Path, count: int) -> dict[str, Any]:
    """Encodes `count` random pictures again; the largest difference from what is stored."""
    config, features = _config_of(folder), FeatureReader(folder)
    spec = features.spec
    checkpoint = fetch_checkpoint(config.model.checkpoint, config.model.revision, ENCODER_PREFIXES)
    _require_same_encoder(folder, encoder_spec(checkpoint, spec.encoder_dtype, spec.dtype))
    pictures = _pictures(features, config)
    chosen = random.sample(sorted(pictures), min(count, len(pictures)))
    wanted = set(chosen)
    digests = {row: digest for digest, row in features.stored() if row in wanted}
    preprocess = Preprocessor(checkpoint)
    encoder = load_encoder(checkpoint, pick_device(), getattr(torch, spec.encoder_dtype))
    allowed = _APART[spec.encoder_dtype] + torch.finfo(getattr(torch, spec.dtype)).eps
    differences_found: list[float] = []
    beyond = []
    with progress_bar("encoding", len(chosen), "pictures") as bar, torch.inference_mode():
        for row in chosen:
            pixel_values = _pixel_values(pictures[row], digests[row], preprocess)
            if pixel_values is not None:
                again = encoder(torch.from_numpy(pixel_values)[None].to(pick_device()))
                stored = _as_float(features.gather(np.array([row])), spec)
                differences_found.append(float((again.cpu().float() - stored).abs().max()))
                if not differences_found[-1] <= allowed * float(stored.abs().max()):
                    beyond.append(f"{pictures[row]}: comes out {differences_found[-1]:.3g} apart from what is stored")
            bar.update()
    if beyond:
        log_info(f"{folder}: features differ by more than {allowed:.2g} of a row's largest number: that is no rounding")
    return {
        "reencoded": len(differences_found),
        "not_compared": len(chosen) - len(differences_found),
        "largest_difference": max(differences_found, default=None),
        "reencode_differs": bool(beyond),
        "damaged": beyond,
    }


def _config_of(folder: Path) -> Config:
    """The config that the cache in `folder` was made with."""
    made: dict[str, Any] = Manifest.load(folder).provenance.get("config", {})
    try:
        return Config.model_validate({**made, "cache": {**made.get("cache", {}), "dir": folder}})
    except ValueError:
        raise PipelineError(
            f"{folder}: does not say how it was made: `pipe cache repair CONFIG` with its config"
        ) from None


def _require_same_encoder(folder: Path, spec: CacheSpec) -> None:
    differences = Manifest.load(folder).spec.diff(spec)
    if differences:
        raise PipelineError(
            f"{folder}: was not made with this checkpoint and config; nothing was changed:\n  "
            + "\n  ".join(differences)
        )


def _require_pictures(folder: Path, damages: Sequence[audit.Damage], inputs: DatasetScan) -> None:
    """Raises `PipelineError` if a lost row could not be encoded again."""
    gone = [*dict.fromkeys(_pictures_gone(folder, damages, inputs))]
    if gone:
        named = ", ".join(gone[:MAX_NAMED]) + (", ..." if len(gone) > MAX_NAMED else "")
        raise PipelineError(
            f"{folder}: of damaged rows these pictures ({len(gone)}) are not as they were encoded: {named}. "
            "Is their disk mounted? If they are changed or gone for good, run `pipe precompute` instead. "
            "Nothing was changed"
        )


def _pictures_gone(folder: Path, damages: Sequence[audit.Damage], inputs: DatasetScan) -> Iterator[str]:
    """The pictures that there are questions on, whose rows are lost, and that are missing or changed."""
    manifest = Manifest.load(folder)
    lost = _lost_rows(folder, manifest, damages)
    there = set(inputs.digests.values())
    usable = {(split, example.question_id) for split, examples in inputs.splits.items() for example in examples}
    damaged = {damage.file for damage in damages}
    for split, text in manifest.splits.items():
        if text.file in damaged:
            continue
        table = TextTable.load(folder / text.file)
        for i in np.flatnonzero(np.isin(table.image_row, [*lost])).tolist():
            record, digest = table.record(i), lost[int(table.image_row[i])]
            if digest not in there if digest else (split, record["question_id"]) not in usable:
                yield record["image"]


def _lost_rows(folder: Path, manifest: Manifest, damages: Sequence[audit.Damage]) -> dict[int, bytes | None]:
    """Row of the cache -> digest of its picture, None where the part cannot be trusted to tell it."""
    lost: dict[int, bytes | None] = {}
    start = 0
    for part in manifest.parts:
        rows = [damage.row for damage in damages if damage.file == part.file]
        if None in rows:
            lost |= dict.fromkeys(range(start, start + part.rows))
        elif rows:
            digests = inspect_part(folder / part.file).digests
            lost |= {start + row: digests[row].tobytes() for row in rows if row is not None}
        start += part.rows
    return lost


def _pictures(features: FeatureReader, config: Config) -> dict[int, ImageSource]:
    """Row -> where its picture is found, for every row that a question is about."""
    in_tables = {
        (split, example.question_id): example.image
        for split, files in config.data.splits.items()
        if files.tables
        for example in read_split(config.data.format, split, files)[0].examples
    }
    pictures: dict[int, ImageSource] = {}
    for split in features.splits:
        text = features.text(split)
        for i, row in enumerate(text.image_row.tolist()):
            record = text.record(i)
            pictures[row] = in_tables.get((split, record["question_id"])) or Path(record["image"])
    return pictures


def _pixel_values(picture: ImageSource, digest: bytes, preprocess: Preprocessor) -> np.ndarray | None:
    """(3, H, W), or None if the picture is not there any more as it was; said in a line."""
    try:
        data = read_image_bytes(picture)
        if image_digest(data) == digest:
            return preprocess(data)
        log_info(f"{picture}: has changed since it was encoded; not compared")
    except ImageError as error:
        log_info(f"{picture}: {error}; not compared")
    return None


def _as_float(stored: np.ndarray, spec: CacheSpec) -> torch.Tensor:
    tensor = torch.from_numpy(stored)
    return (tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor).float()

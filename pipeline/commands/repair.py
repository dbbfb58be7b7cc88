"""`pipe cache repair`: encode the damaged rows of a cache again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache import audit
from cache.format import inspect_part
from cache.lock import exclude_readers
from cache.manifest import Manifest
from cache.repair import drop_damaged
from cache.spec import CacheError, CacheSpec
from cache.text import TextTable
from pipeline.commands.cache import cache_folder, describe_damage
from pipeline.commands.precompute import fill_cache
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.common.result import Result
from pipeline.config import load_config
from pipeline.data.in_memory import normalize_data
from pipeline.encoding.dataset_scan import DatasetScan
from pipeline.encoding.provenance import check_same_encoder, config_of_cache, in_memory_splits, sources_of_cache
from pipeline.encoding.skipped_items import MAX_NAMED


@dataclass(frozen=True)
class RepairResult(Result):
    """Result of `repair`."""

    cache: str
    repaired: list[str]
    """The damaged files and rows."""
    encoded: int
    reused: int | None = None
    failed: int | None = None
    """Images that are invalid."""


def repair(cache: Path, data: Mapping[str, Any] | None = None) -> RepairResult | None:
    """Remove damaged rows from a cache and encode them again, as well as rows that are missing.

    Nothing is removed before the whole cache was read, and the images of the damaged rows were found unchanged.

    Args:
        cache: folder of the cache, repaired with the config that it was made with, or a config.
        data: the splits that were passed to `precompute` from Python; a cache does not contain their images.

    Returns:
        The result; None on ranks other than 0.

    Raises:
        CacheError, PipelineError: the cache cannot be repaired; it is unchanged.
    """
    folder = cache_folder(cache)
    damages = audit.verify(folder).damage
    if not damages:
        return RepairResult(str(folder), repaired=[], encoded=0)
    _check_repairable(folder, damages)
    _check_in_memory_splits(folder, data)

    def drop_rows(scan: DatasetScan, spec: CacheSpec) -> None:
        check_same_encoder(folder, spec)
        _check_images(folder, damages, scan)
        log_info(f"{folder}: {drop_damaged(folder, damages)} damaged rows removed")

    config = load_config(cache) if cache.is_file() else config_of_cache(folder)
    result = fill_cache(config, data, before_writing=drop_rows)
    if result is None:
        return None
    repaired = [describe_damage(damage) for damage in damages]
    return RepairResult(str(folder), repaired, result.encoded, result.reused, result.failed)


def _check_repairable(folder: Path, damages: Sequence[audit.Damage]) -> None:
    """Raise an error for files that cannot be read or do not belong to the cache, or if the cache is in use."""
    if unreadable := [describe_damage(damage) for damage in damages if damage.unreadable]:
        raise PipelineError(f"{folder}: cannot be read, so nothing was changed: {'; '.join(unreadable)}")
    with exclude_readers(folder, "repair"):  # checked before the images are read
        pass
    for damage in damages:
        if damage.problem == audit.NOT_A_PART:
            raise CacheError(f"{folder / damage.file}: {damage.problem}, and run `pipe cache repair` again")


def _check_in_memory_splits(folder: Path, data: Mapping[str, Any] | None) -> None:
    """Raise `PipelineError` if the cache was made of splits from Python that are not in `data`."""
    missing = [split for split in in_memory_splits(sources_of_cache(folder)) if split not in normalize_data(data)]
    if missing:
        splits = ", ".join(f"{split!r}: ..." for split in missing)
        raise PipelineError(
            f"{folder}: the data of {', '.join(missing)} was passed from Python and is not stored in the cache. "
            f"Repair the cache from Python with the same data: pipeline.commands.repair.repair(Path({str(folder)!r}), "
            f"data={{{splits}}}). Nothing was changed"
        )


def _check_images(folder: Path, damages: Sequence[audit.Damage], scan: DatasetScan) -> None:
    """Raise `PipelineError` if the image of a damaged row is missing or changed."""
    lost = list(dict.fromkeys(_lost_images(folder, damages, scan)))
    if lost:
        named = ", ".join(lost[:MAX_NAMED]) + (", ..." if len(lost) > MAX_NAMED else "")
        raise PipelineError(
            f"{folder}: the images of {len(lost)} damaged rows are missing or changed: {named}. Is their disk mounted? "
            "If they are gone or changed permanently, run `pipe precompute` instead. Nothing was changed"
        )


def _lost_images(folder: Path, damages: Sequence[audit.Damage], scan: DatasetScan) -> Iterator[str]:
    """Yield the images of damaged rows that a question needs and that are missing or changed."""
    manifest = Manifest.load(folder)
    digest_of_row = _damaged_rows(folder, manifest, damages)
    found = set(scan.digests.values())
    questions = {(split, example.question_id) for split, examples in scan.splits.items() for example in examples}
    damaged_files = {damage.file for damage in damages}
    for split, text in manifest.splits.items():
        if text.file in damaged_files:
            continue
        table = TextTable.load(folder / text.file)
        for index in np.flatnonzero(np.isin(table.image_row, [*digest_of_row])).tolist():
            record, digest = table.record(index), digest_of_row[int(table.image_row[index])]
            is_found = digest in found if digest else (split, record["question_id"]) in questions
            if not is_found:
                yield record["image"]


def _damaged_rows(folder: Path, manifest: Manifest, damages: Sequence[audit.Damage]) -> dict[int, bytes | None]:
    """Return the digest of each damaged row of the cache, None if its part is damaged as a whole."""
    digests: dict[int, bytes | None] = {}
    start = 0
    for part in manifest.parts:
        rows = [damage.row for damage in damages if damage.file == part.file]
        if None in rows:
            digests |= dict.fromkeys(range(start, start + part.rows))
        elif rows:
            stored = inspect_part(folder / part.file).digests
            digests |= {start + row: stored[row].tobytes() for row in rows if row is not None}
        start += part.rows
    return digests

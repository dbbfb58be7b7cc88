"""Log, list and summarize the questions that stage one skips."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info, log_warning
from pipeline.data.examples import DUPLICATE_ANNOTATION, DUPLICATE_ID, SkippedItem
from pipeline.encoding.dataset_scan import DatasetScan

SKIPPED_NAME = "skipped.jsonl"
"""Name of the list in the cache."""
MAX_NAMED = 3
"""Reasons, and items per reason, that a message names."""


def log_skipped(scan: DatasetScan, new: Sequence[SkippedItem], on_invalid: str, report: Path | None) -> None:
    """Log newly skipped items, or raise an error if they stop the run.

    Args:
        scan: the dataset without the new items.
        new: the items.
        on_invalid: `precompute.on_invalid`.
        report: file for the list of all skipped items if the run stops.

    Raises:
        PipelineError: `on_invalid` is "error", or a split has no questions left.
    """
    if not new:
        return
    empty = [split for split, examples in scan.splits.items() if not examples]
    if on_invalid == "skip" and not empty:
        log_info(f"skipped: {summarize_skipped(new)}")
        return
    listed = ""
    if report:
        _write_report(scan, report)
        listed = f". Complete list: {report}"
    if on_invalid == "skip":
        raise PipelineError(
            f"no questions of {', '.join(empty)} are left: {summarize_skipped(new)}{listed}. Check data.*.images"
        )
    raise PipelineError(
        f"Invalid questions: {summarize_skipped(new)}{listed}. Fix the data, or set precompute.on_invalid=skip"
    )


def log_rescaled(scan: DatasetScan) -> None:
    """Warn, in one line, about images that other libraries decode differently."""
    if count := scan.num_rescaled:
        first = next(image for image in scan.images.values() if image in scan.rescaled)
        log_warning(
            f"{count} images have more than 8 bits per channel or float pixels (first: {first}); each is scaled to its "
            "own range, from black to white"
        )


def summarize_skipped(skipped: Sequence[SkippedItem]) -> str:
    """Return the number of questions and the first positions by reason; images first, then by number."""
    by_reason: dict[str, list[SkippedItem]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(item)
    reasons = sorted(by_reason.items(), key=lambda pair: (pair[1][0].question_id is not None, -len(pair[1])))
    parts = []
    for reason, items in reasons[:MAX_NAMED]:
        named = ", ".join(map(_position, items[:MAX_NAMED])) + (", ..." if len(items) > MAX_NAMED else "")
        parts.append(f"{sum(item.questions for item in items)} questions ({reason}: {named})")
    others = sum(item.questions for _, items in reasons[MAX_NAMED:] for item in items)
    return "; ".join(parts) + (f"; {others} questions for other reasons" if others else "")


def skipped_lines(skipped: Iterable[SkippedItem]) -> bytes:
    """Return the items as JSON lines."""
    records = ({key: value for key, value in asdict(item).items() if value is not None} for item in skipped)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return lines.encode("utf-8", "backslashreplace")


def _write_report(scan: DatasetScan, report: Path) -> None:
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_bytes(skipped_lines(scan.skipped))
    except OSError as error:
        raise PipelineError(
            f"{report}: cannot write the list of skipped questions: {error.strerror}. Completed work is saved. "
            "Fix this and run the same command again, or choose another cache.dir"
        ) from error


def _position(item: SkippedItem) -> str:
    if item.reason in (DUPLICATE_ID, DUPLICATE_ANNOTATION):
        return f"{item.question_id!r} of {item.split} at {item.where}"
    return item.where

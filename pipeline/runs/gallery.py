"""Choose the example questions that a report shows with their images, and collect what it shows of them."""

import base64
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.progress import log_warning
from pipeline.data.examples import VQAExample
from pipeline.runs.run import Run

MIN_CORRECT_ACCURACY = 50.0
"""A prediction of at least this accuracy counts as correct in the report."""
VERDICTS = ("incorrect", "regressed", "fixed", "correct", "unscored")
"""In display order. Regressed and fixed compare with the predictions before LoRA."""
MAX_REFERENCES = 5
"""Distinct references shown per question."""
_IMAGE_TYPES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"GI": "gif", b"RI": "webp"}

Predictions = list[dict[str, Any]]
"""Rows of `predictions-SPLIT.jsonl`, one per question: `question_id`, `answer`, `accuracy`, `probability`."""


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions that `pipe evaluate` wrote to `path`; None if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else None


def verdict_of(before: float | None, after: float | None) -> str:
    """Return the verdict on a question, given the accuracies of its predictions before and after LoRA."""
    if after is None:
        return "unscored"
    is_correct = after >= MIN_CORRECT_ACCURACY
    if before is None or (before >= MIN_CORRECT_ACCURACY) == is_correct:
        return "correct" if is_correct else "incorrect"
    return "fixed" if is_correct else "regressed"


def choose_examples(verdicts: Sequence[str], max_examples: int, seed: int) -> list[int]:
    """Return the indices of up to `max_examples` random questions, in the order of `VERDICTS`.

    Each verdict gets the same number of examples; what a verdict cannot fill is divided among the others.
    """
    groups = {name: [index for index, one in enumerate(verdicts) if one == name] for name in VERDICTS}
    remaining, counts = max_examples, {}
    for number, name in enumerate(sorted(VERDICTS, key=lambda name: len(groups[name]))):
        counts[name] = min(len(groups[name]), remaining // (len(VERDICTS) - number))
        remaining -= counts[name]
    rng = random.Random(seed)
    return [index for name in VERDICTS for index in rng.sample(groups[name], counts[name])]


def collect_gallery(
    run: Run, features: FeatureReader, split: str, max_examples: int, seed: int
) -> dict[str, Any] | None:
    """Return the examples and thumbnails for the report page; None if the predictions do not fit the cache.

    Raises:
        CacheError: the questions cannot be read from the cache.
    """
    after, before = (read_predictions(run.predictions(split, with_adapter)) for with_adapter in (True, False))
    text = features.text(split)
    if after is None or len(after) != len(text):
        return None
    if before is None or len(before) != len(text):
        before = None
    verdicts = [
        verdict_of(before[index]["accuracy"] if before else None, prediction["accuracy"])
        for index, prediction in enumerate(after)
    ]
    chosen = choose_examples(verdicts, max_examples, seed)
    examples = [VQAExample.from_record(text.record(index)) for index in chosen]
    if any(example.question_id != after[index]["question_id"] for example, index in zip(examples, chosen, strict=True)):
        return None
    rows = text.image_row[chosen].tolist()
    return {
        "compared": before is not None,
        "counts": Counter(verdicts),
        "thumbnails": _thumbnails(features, rows),
        "examples": [
            _example(example, row, verdicts[index], after[index], before[index] if before else None)
            for example, row, index in zip(examples, rows, chosen, strict=True)
        ],
    }


def _example(
    example: VQAExample, row: int, verdict: str, after: dict[str, Any], before: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "row": row,
        "verdict": verdict,
        "question": example.question,
        "references": Counter(example.answers).most_common(MAX_REFERENCES),
        "answer_type": example.answer_type,
        "after": after,
        "before": before,
    }


def _thumbnails(features: FeatureReader, rows: Sequence[int]) -> dict[int, str]:
    """Return thumbnails as data URIs by image row; none, with a warning, if the file of thumbnails is damaged."""
    try:
        thumbnails = features.thumbnails(rows)
    except CacheError as error:
        log_warning(str(error))
        return {}
    return {
        row: f"data:image/{_IMAGE_TYPES.get(data[:2], 'jpeg')};base64,{base64.b64encode(data).decode()}"
        for row, data in thumbnails.items()
    }

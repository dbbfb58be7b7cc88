"""Which questions a report shows with their pictures: mistakes, what LoRA mended, what it broke, and some others."""

import base64
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.common.progress import log_info
from pipeline.data.examples import VQAExample
from pipeline.runs.run import Run

RIGHT = 50.0
"""The accuracy from which on an answer counts as right here."""
VERDICTS = ("mistake", "broken", "fixed", "right", "unknown")
"""In the order in which they are shown; broken and fixed need the answers before LoRA."""
PEOPLE = 5  # different answers of theirs, at most
_TYPES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"GI": "gif", b"RI": "webp"}

Answers = list[dict[str, Any]]
"""Of `pipe evaluate`, a question of the split each: `question_id`, `answer`, `accuracy`, `probability`."""


def read_answers(path: Path) -> Answers | None:
    """None if they were not written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else None


def verdict(before: float | None, after: float | None) -> str:
    """What became of a question, by the accuracies of its answers."""
    if after is None:
        return "unknown"
    if before is None or (before >= RIGHT) == (after >= RIGHT):
        return "right" if after >= RIGHT else "mistake"
    return "fixed" if after >= RIGHT else "broken"


def choose(verdicts: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of `count` questions, as many of each verdict as there are, in the order of `VERDICTS`."""
    groups = {kind: [place for place, one in enumerate(verdicts) if one == kind] for kind in VERDICTS}
    left, shares = count, {}
    for number, kind in enumerate(sorted(VERDICTS, key=lambda kind: len(groups[kind]))):
        shares[kind] = min(len(groups[kind]), left // (len(VERDICTS) - number))
        left -= shares[kind]
    rng = random.Random(seed)
    return [place for kind in VERDICTS for place in rng.sample(groups[kind], shares[kind])]


def gallery(run: Run, features: FeatureReader, split: str, count: int, seed: int) -> dict[str, Any] | None:
    """The examples with their pictures, as the page takes them; None if the answers are not those of the cache's text.

    Raises CacheError if the text cannot be read.
    """
    after, before = (read_answers(run.predictions(split, with_adapter)) for with_adapter in (True, False))
    text = features.text(split)
    if after is None or len(after) != len(text):
        return None
    if before is None or len(before) != len(text):
        before = None
    verdicts = [
        verdict(before[place]["accuracy"] if before else None, one["accuracy"]) for place, one in enumerate(after)
    ]
    chosen = choose(verdicts, count, seed)
    examples = [VQAExample.from_record(text.record(place)) for place in chosen]
    if any(example.question_id != after[place]["question_id"] for example, place in zip(examples, chosen, strict=True)):
        return None
    rows = text.image_row[chosen].tolist()
    return {
        "compared": before is not None,
        "counts": Counter(verdicts),
        "pictures": _pictures(features, rows),
        "examples": [
            _example(example, row, verdicts[place], after[place], before[place] if before else None)
            for example, row, place in zip(examples, rows, chosen, strict=True)
        ],
    }


def _example(
    example: VQAExample, row: int, verdict: str, after: dict[str, Any], before: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "row": row,
        "verdict": verdict,
        "question": example.question,
        "people": Counter(example.answers).most_common(PEOPLE),
        "type": example.answer_type,
        "after": after,
        "before": before,
    }


def _pictures(features: FeatureReader, rows: Sequence[int]) -> dict[int, str]:
    """Row -> thumbnail as a data URI; a damaged file of them is said, and shows nothing."""
    try:
        found = features.thumbnails(rows)
    except CacheError as error:
        log_info(str(error))
        return {}
    return {
        row: f"data:image/{_TYPES.get(data[:2], 'jpeg')};base64,{base64.b64encode(data).decode()}"
        for row, data in found.items()
    }

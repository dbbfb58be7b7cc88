"""How good a split's answers are: their mean accuracy, how sure it is, and what it is made of."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

from pipeline.answers.vqa_accuracy import FOR_SEVERAL, vqa_accuracy
from pipeline.common.errors import PipelineError
from pipeline.data.examples import DIFFICULT, VQAExample

CONFIDENCE = 0.95


def score(examples: Sequence[VQAExample], answers: Sequence[str], metric: str) -> list[float | None]:
    """The accuracy of each answer, 0 to 100; None where people's answers are not known, or the metric leaves it out."""
    return [
        vqa_accuracy(answer, example.answers, metric) if counts(example, metric) else None
        for example, answer in zip(examples, answers, strict=True)
    ]


def counts(example: VQAExample, metric: str) -> bool:
    """Whether an answer to it has an accuracy: people's answers are known, and the metric does not leave it out."""
    return bool(example.answers) and not (metric == "a-okvqa" and example.answer_type == DIFFICULT)


def summarise(
    examples: Sequence[VQAExample], scores: Sequence[float | None], images: Sequence[Hashable]
) -> dict[str, Any]:
    """Mean accuracy of the scored questions with its confidence interval, in all and by type of answer and question.

    `images` is the same for questions on the same picture, wherever each of them has it from.
    """
    places = [place for place, value in enumerate(scores) if value is not None]
    scored = [examples[place] for place in places]
    values = [value for value in scores if value is not None]
    return {
        "questions": len(examples),
        "scored": len(scored),
        "accuracy": fmean(values) if values else None,
        "accuracy_interval": confidence_interval(values, [images[place] for place in places]),
        "per_answer_type": _by_type([example.answer_type or "all" for example in scored], values),
        "per_question_type": _by_type([example.question_type for example in scored], values),
    }


def confidence_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float] | None:
    """[low, high] of the mean, 95 %, within 0 to 100; None of fewer than two clusters.

    The questions on an image are not independent, so that the images count as drawn, not the questions: the
    cluster-robust standard error of a mean (Liang and Zeger, 1986), and the normal distribution.
    """
    if len(set(clusters)) < 2:
        return None
    mean = fmean(values)
    residuals: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    error = math.sqrt(count / (count - 1) * sum(one * one for one in residuals.values())) / len(values)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return [max(0.0, mean - reach), min(100.0, mean + reach)]


def check_metric(examples: Sequence[VQAExample], metric: str) -> None:
    """Raises `PipelineError` where the metric would give every answer nothing."""
    known = {len(example.answers) for example in examples} - {0}
    if metric in FOR_SEVERAL and known == {1}:
        raise PipelineError(
            f"the {metric} VQA accuracy compares several people's answers, and each question here has one: "
            "set evaluate.metric=exact"
        )


def _by_type(types: Sequence[str | None], values: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, value in zip(types, values, strict=True):
        if kind is not None:
            groups[kind].append(value)
    return {kind: fmean(group) for kind, group in sorted(groups.items())}

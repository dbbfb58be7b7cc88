"""Score the predictions of a split: mean accuracy, its confidence interval, and accuracy by type."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

from pipeline.answers.vqa_accuracy import MULTI_REFERENCE_METRICS, vqa_accuracy
from pipeline.common.errors import PipelineError
from pipeline.data.examples import DIFFICULT, VQAExample

CONFIDENCE = 0.95


def score(examples: Sequence[VQAExample], predictions: Sequence[str], metric: str) -> list[float | None]:
    """Return the accuracy of each prediction, 0 to 100; None for questions that are not scored."""
    return [
        vqa_accuracy(prediction, example.answers, metric) if is_scored(example, metric) else None
        for example, prediction in zip(examples, predictions, strict=True)
    ]


def is_scored(example: VQAExample, metric: str) -> bool:
    """Return whether the question has references and the metric does not exclude it."""
    return bool(example.answers) and not (metric == "a-okvqa" and example.answer_type == DIFFICULT)


def summarize(
    examples: Sequence[VQAExample], scores: Sequence[float | None], images: Sequence[Hashable]
) -> dict[str, Any]:
    """Return mean accuracies of the scored questions: overall, by answer type and by question type.

    Args:
        examples: the questions.
        scores: the accuracy of each, 0 to 100, or None.
        images: an identifier of each question's image, equal for questions on the same image.
    """
    scored = [(example, value, image) for example, value, image in zip(examples, scores, images, strict=True)
              if value is not None]  # fmt: skip
    values = [value for _, value, _ in scored]
    return {
        "questions": len(examples),
        "scored": len(scored),
        "accuracy": fmean(values) if values else None,
        "accuracy_interval": confidence_interval(values, [image for _, _, image in scored]),
        "per_answer_type": _mean_by_type([example.answer_type or "all" for example, _, _ in scored], values),
        "per_question_type": _mean_by_type([example.question_type for example, _, _ in scored], values),
    }


def confidence_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float] | None:
    """Return the 95 % confidence interval of the mean as [low, high], clipped to 0 to 100.

    Questions on the same image are not independent, so images are the sampling unit: the interval uses the
    cluster-robust standard error of a mean (Liang and Zeger, 1986) and the normal distribution.

    Args:
        values: accuracies, 0 to 100.
        clusters: the cluster (image) of each value.

    Returns:
        The interval, or None for fewer than two clusters.
    """
    if len(set(clusters)) < 2:
        return None
    mean = fmean(values)
    residuals: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    error = math.sqrt(count / (count - 1) * sum(residual * residual for residual in residuals.values())) / len(values)
    half_width = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return [max(0.0, mean - half_width), min(100.0, mean + half_width)]


def check_metric(examples: Sequence[VQAExample], metric: str) -> None:
    """Check that the metric can reach 100 on these questions.

    Raises:
        PipelineError: the metric compares several references, and each question has only one.
    """
    reference_counts = {len(example.answers) for example in examples} - {0}
    if metric in MULTI_REFERENCE_METRICS and reference_counts == {1}:
        raise PipelineError(
            f"the {metric} VQA accuracy compares several references per question, and each question here has one: "
            "set evaluate.metric=exact"
        )


def _mean_by_type(types: Sequence[str | None], values: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in zip(types, values, strict=True):
        if name is not None:
            groups[name].append(value)
    return {name: fmean(group) for name, group in sorted(groups.items())}

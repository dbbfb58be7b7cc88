"""Scores and summaries of predictions."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.answers.scores import check_metric, confidence_interval, score, summarize
from pipeline.common.errors import PipelineError
from pipeline.data.examples import DIFFICULT, VQAExample


def example(number: int, *answers: str, image: str = "", kind: str | None = None) -> VQAExample:
    return VQAExample(number, Path(image or f"{number}.png"), "what?", answers, kind, f"what {number % 2}")


def test_questions_without_references_are_not_scored() -> None:
    examples = [example(0, "red"), example(1), example(2, "blue")]
    scores = score(examples, ["red", "red", "red"], "exact")
    assert scores == [100, None, 0]
    summary = summarize(examples, scores, [one.image for one in examples])
    assert (summary["questions"], summary["scored"], summary["accuracy"]) == (3, 2, 50)
    unscored = summarize([example(1)], [None], [0])
    assert (unscored["accuracy"], unscored["accuracy_interval"], unscored["per_answer_type"]) == (None, None, {})


def test_a_okvqa_excludes_the_questions_that_its_script_excludes() -> None:
    examples = [example(0, "red", kind=DIFFICULT), example(1, "red", kind="direct answer")]
    assert score(examples, ["red", "red"], "a-okvqa") == [None, pytest.approx(100 / 3)]
    assert score(examples, ["red", "red"], "exact") == [100, 100]


def test_accuracy_is_averaged_by_answer_type_and_question_type() -> None:
    examples = [example(0, "a", kind="other"), example(1, "a", kind="yes/no"), example(2, "a", kind="other")]
    summary = summarize(examples, [100, 0, 50], [0, 1, 2])
    assert summary["per_answer_type"] == {"other": 75, "yes/no": 0}
    assert summary["per_question_type"] == {"what 0": 75, "what 1": 0}
    assert summarize([example(0, "a")], [30], [0])["per_answer_type"] == {"all": 30}


def test_interval_with_one_question_per_image_is_the_textbook_interval() -> None:
    values = [100.0] * 60 + [0.0] * 40
    low, high = confidence_interval(values, [str(number) for number in range(100)]) or (0, 0)
    error = np.std(values, ddof=1) / 10
    assert (low, high) == pytest.approx((60 - 1.959964 * error, 60 + 1.959964 * error), rel=1e-6)


def test_correlated_questions_on_an_image_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(200), 5)
    values = 100.0 * (rng.random(200) < 0.5)[images]
    low, high = confidence_interval(values.tolist(), [str(image) for image in images]) or (0, 0)
    own_image = [str(number) for number in range(1000)]
    independent_low, independent_high = confidence_interval(values.tolist(), own_image) or (0, 0)
    assert (high - low) / (independent_high - independent_low) == pytest.approx(5**0.5, rel=0.02)


def test_interval_covers_the_true_mean_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        difficulty = rng.beta(2, 2, 100)  # questions on an image are similarly hard
        images = np.repeat(np.arange(100), 4)
        values = 100.0 * (rng.random(400) < difficulty[images])
        low, high = confidence_interval(values.tolist(), [str(image) for image in images]) or (0, 0)
        covered += low <= 50 <= high
    assert 0.92 < covered / 400 < 0.98


def test_interval_needs_two_images_and_stays_within_0_to_100() -> None:
    assert confidence_interval([100.0, 0.0], ["a", "a"]) is None
    low, high = confidence_interval([100.0, 100.0, 100.0, 0.0], ["a", "b", "c", "d"]) or (0, 0)
    assert (low > 0, high) == (True, 100)


@pytest.mark.parametrize("metric", ["official", "lavis", "lmms-eval", "a-okvqa"])
def test_metric_for_several_references_is_rejected_with_one_reference_per_question(metric: str) -> None:
    with pytest.raises(PipelineError, match=rf"the {metric} VQA accuracy .* set evaluate\.metric=exact"):
        check_metric([example(0, "red"), example(1, "blue")], metric)
    check_metric([example(0, "red"), example(1, "blue", "red")], metric)
    check_metric([example(0, "red")], "exact")
    with pytest.raises(PipelineError, match="exact"):
        check_metric([example(0, "red"), example(1)], metric)
    check_metric([example(0)], metric)

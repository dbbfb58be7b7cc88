"""VQA accuracy: agreement with published scripts, and where the metrics differ."""

from typing import get_args

import pytest

from pipeline.answers.vqa_accuracy import METRICS, vqa_accuracy
from pipeline.common.errors import PipelineError
from pipeline.config import EvaluateConfig

# (prediction, {reference: count}, accuracy): the values of GT-Vision-Lab/VQA's vqaEval.py, rounded to two digits as
# it does.
OFFICIAL = [
    ("yes", {"yes": 10}, 100.0),
    ("Yes.", {"yes": 10}, 0.0),
    ("Yes", {"yes": 10}, 0.0),
    (" yes\n", {"yes\t": 10}, 100.0),
    ("Yes.", {"yes": 9, "no": 1}, 100.0),
    ("YES", {"yes": 3, "no": 7}, 90.0),
    ("yes", {"yes": 2, "no": 8}, 60.0),
    ("yes", {"yes": 1, "no": 9}, 30.0),
    ("yes", {"Yes": 5, "yes": 5}, 100.0),
    ("yes", {"yes": 4, "no": 6}, 100.0),
    ("maybe", {"yes": 9, "no": 1}, 0.0),
    ("yes", {"yes": 1}, 0.0),
    ("yes", {"yes": 2}, 33.33),
    ("yes", {"yes": 3}, 66.67),
    ("yes", {"yes": 1, "no": 1}, 16.67),
    ("yes", {"yes": 2, "no": 1}, 44.44),
    ("yes", {"yes": 4}, 100.0),
    ("the", {"": 5, "cat": 5}, 100.0),
    ("", {"the": 3, "a": 2, "an": 1, "cat": 4}, 100.0),
    ("a red car", {"red car": 3, "Car": 7}, 90.0),
    ("The Car", {"a car": 2, "bus": 8}, 60.0),
    ("another", {"other": 5, "x": 5}, 0.0),
    ("none", {"0": 3, "1": 7}, 90.0),
    ("zero", {"none": 3, "1": 7}, 90.0),
    ("ten", {"10": 3, "x": 7}, 90.0),
    ("eleven", {"11": 9, "x": 1}, 0.0),
    ("two dogs", {"2 dogs": 3, "dogs": 7}, 90.0),
    ("someone", {"some1": 9, "x": 1}, 0.0),
    ("none", {"0": 10}, 0.0),
    ("dont", {"don't": 3, "do": 7}, 90.0),
    ("don't", {"dont": 2, "do": 8}, 60.0),
    ("do'nt", {"don't": 9, "do": 1}, 0.0),
    ("Im", {"I'm": 9, "x": 1}, 0.0),
    ("lets", {"let's": 9, "x": 1}, 0.0),
    ("couldntve", {"couldn't've": 9, "x": 1}, 0.0),
    ("couldntve", {"couldntve": 3, "x": 7}, 90.0),
    ("somebody'd", {"somebodyd": 3, "x": 7}, 90.0),
    ("'ow'sat", {"'ow's'at": 3, "x": 7}, 90.0),
    ("twas", {"'twas": 2, "x": 8}, 60.0),
    ("dogs'", {"dogs": 9, "x": 1}, 0.0),
    ("1,000", {"1000": 3, "x": 7}, 90.0),
    ("1, 000", {"1 000": 3, "x": 7}, 90.0),
    ("a,b", {"a b": 3, "ab": 7}, 90.0),
    ("a, b", {"b": 3, "a b": 7}, 100.0),
    ("red,blue 1,2", {"redblue 12": 3, "x": 7}, 90.0),
    ("red,white,blue, green", {"redwhiteblue green": 3, "x": 7}, 90.0),
    ("x-ray", {"x ray": 3, "xray": 7}, 90.0),
    ("x -ray", {"xray": 3, "x ray": 7}, 100.0),
    ("t-shirt - red", {"tshirt red": 3, "t shirt red": 7}, 90.0),
    ("t-shirt -red", {"tshirt red": 3, "t shirt red": 7}, 90.0),
    ("t-shirt- red", {"tshirt red": 3, "t shirt red": 7}, 90.0),
    ("1,5 t-shirt", {"15 tshirt": 3, "x": 7}, 90.0),
    ("black/white", {"black white": 3, "blackwhite": 7}, 90.0),
    ("what?!", {"what": 3, "x": 7}, 90.0),
    ("?", {"": 3, "x": 7}, 90.0),
    ("(left)", {"left": 3, "x": 7}, 90.0),
    ("11:30", {"11 30": 9, "x": 1}, 0.0),
    ("50%", {"50": 9, "x": 1}, 0.0),
    ("#1", {"1": 9, "x": 1}, 0.0),
    ("3.5", {"3.5": 3, "35": 7}, 90.0),
    ("5.", {"5": 3, "x": 7}, 90.0),
    (".5", {"5": 9, ".5": 1}, 30.0),
    ("u.s.a.", {"usa": 3, "us": 7}, 90.0),
    ("3.a", {"3a": 3, "x": 7}, 90.0),
    ("1.2.3.", {"1.2.3": 3, "x": 7}, 90.0),
    ("a.", {"": 3, "x": 7}, 90.0),
    ("x" + "." * 32, {"x": 3, "y": 7}, 90.0),
    ("x" + "." * 33, {"x": 9, "y": 1}, 0.0),
    ("x" + "." * 33, {"X" + "." * 33: 3, "x": 7}, 90.0),
    ("red\ncar", {"red car": 3, "x": 7}, 90.0),
    ("red\ncar", {"red car": 10}, 100.0),
    ("red  car", {"red car": 10}, 0.0),
    ("red  car", {"red car": 9, "x": 1}, 100.0),
    ("red\rcar", {"red car": 10}, 0.0),
    ("red\u00a0car", {"red car": 3, "x": 7}, 90.0),
    ("\u00a0yes\u3000", {"yes": 10}, 100.0),
    ("CAFÉ", {"café": 3, "cafe": 7}, 90.0),
    ("don\u2019t", {"don't": 9, "x": 1}, 0.0),
    ("yes。", {"yes": 9, "x": 1}, 0.0),
    ("中文", {"中文": 2, "x": 8}, 60.0),
    ("٣.٤", {"٣.٤": 3, "٣٤": 7}, 90.0),
    ("yes", {"yes": 3, "Yes.": 1, "the yes": 1, "no": 5}, 100.0),
    ("red", {"red": 2, "Red": 1, "blue": 3, "Blue!": 4}, 90.0),
]


SCRIPTS = ("official", "lavis", "lmms-eval", "a-okvqa")
# (prediction, {reference: count}, the accuracy of each of the SCRIPTS, to two digits)
COMPARED = [
    ("yes", {"yes": 10}, 100, 100, 100, 100),
    ("Yes.", {"yes": 10}, 0, 100, 100, 0),
    ("yes", {"Yes": 10}, 0, 0, 100, 0),
    (" yes\n", {"yes": 10}, 100, 100, 100, 0),
    ("yes", {"yes\t": 10}, 100, 0, 100, 0),
    ("Yes.", {"yes": 9, "no": 1}, 100, 100, 100, 0),
    ("yes", {"Yes": 3, "no": 7}, 90, 0, 90, 0),
    ("yes", {"yes.": 3, "no": 7}, 90, 90, 90, 0),
    ("yes", {"yes!": 10}, 0, 0, 100, 0),
    ("yes", {"yes ": 3, "no": 7}, 90, 0, 90, 0),
    ("yes", {"yes": 3, "no": 7}, 90, 90, 90, 100),
    ("yes", {"yes": 2, "no": 8}, 60, 60, 60, 66.67),
    ("yes", {"yes": 1, "no": 9}, 30, 30, 30, 33.33),
    ("yes", {"yes": 1}, 0, 0, 0, 33.33),
    ("yes", {"yes": 2}, 33.33, 33.33, 33.33, 66.67),
    ("yes", {"yes": 3}, 66.67, 66.67, 66.67, 100),
    ("yes", {"yes": 1, "no": 1}, 16.67, 16.67, 16.67, 33.33),
    ("two", {"two": 10}, 100, 0, 100, 100),
    ("two", {"2": 10}, 0, 100, 100, 0),
    ("2", {"two": 3, "3": 7}, 90, 0, 90, 0),
    ("none", {"none": 10}, 100, 0, 100, 100),
    ("none", {"0": 3, "1": 7}, 90, 90, 90, 0),
    ("the cat", {"the cat": 10}, 100, 0, 100, 100),
    ("a cat", {"cat": 10}, 0, 100, 100, 0),
    ("cat", {"a cat": 3, "dog": 7}, 90, 0, 90, 0),
    ("the", {"": 3, "x": 7}, 90, 90, 90, 0),
    ("don't", {"dont": 10}, 0, 0, 100, 0),
    ("dont", {"dont": 10}, 100, 0, 100, 100),
    ("dont", {"don't": 3, "do": 7}, 90, 90, 90, 0),
    ("somebody'd", {"somebodyd": 10}, 0, 100, 100, 0),
    ("twas", {"'twas": 2, "x": 8}, 60, 60, 60, 0),
    ("x-ray", {"x-ray": 10}, 100, 0, 100, 100),
    ("x-ray", {"x-ray": 3, "ray": 7}, 90, 90, 90, 100),
    ("x-ray", {"x ray": 10}, 0, 100, 100, 0),
    ("x -ray", {"xray": 3, "x ray": 7}, 100, 100, 100, 0),
    ("t-shirt, red", {"t shirt red": 4, "tshirt red": 6}, 100, 100, 100, 0),
    ("1,5 t-shirt", {"15 tshirt": 10}, 0, 100, 100, 0),
    ("1,000", {"1,000": 10}, 100, 0, 100, 100),
    ("1,000", {"1,000": 3, "1": 7}, 90, 90, 90, 100),
    ("1,000", {"1000": 10}, 0, 100, 100, 0),
    ("1,,000", {"1000": 3, "1 000": 2, "x": 5}, 60, 60, 90, 0),
    ("1,,5 t-shirt", {"15 tshirt": 10}, 0, 0, 100, 0),
    ("1,,5", {"1,,5": 3, "x": 7}, 90, 0, 90, 100),
    ("5.", {"5": 10}, 0, 100, 100, 0),
    ("u.s.a.", {"u.s.a.": 10}, 100, 0, 100, 100),
    ("u.s.a.", {"usa": 10}, 0, 100, 100, 0),
    ("u.s.a.", {"U.S.A.": 3, "us": 7}, 90, 0, 90, 0),
    ("3.5", {"3.5": 10}, 100, 100, 100, 100),
    ("x" + "." * 32, {"x": 10}, 0, 100, 100, 0),
    ("x" + "." * 33, {"x": 10}, 0, 0, 0, 0),
    ("x" + "." * 33, {"x.": 10}, 0, 100, 0, 0),
    ("x" + "." * 33, {"x" + "." * 33: 3, "x": 7}, 90, 90, 90, 100),
    ("red  car", {"red car": 10}, 0, 100, 100, 0),
    ("red car", {"red\ncar": 10}, 100, 0, 100, 0),
    ("red car", {"red\rcar": 3, "car": 7}, 90, 0, 90, 0),
    ("red\u00a0car", {"red car": 10}, 0, 100, 100, 0),
    ("", {"": 10}, 100, 100, 100, 100),
    ("", {"?": 3, "x": 7}, 90, 0, 90, 0),
    ("?", {"": 10}, 0, 100, 100, 0),
    ("CAFÉ", {"café": 10}, 0, 100, 100, 0),
    ("٣,٤", {"٣٤": 10}, 0, 100, 100, 0),
    ("中文", {"中文": 2, "x": 8}, 60, 60, 60, 66.67),
    ("red", {"red": 2, "Red": 1, "blue": 3, "Blue!": 4}, 90, 60, 90, 66.67),
    ("red", {"red": 1, "a red": 1, "red,": 1, "Red.": 1, "blue": 6}, 100, 30, 100, 33.33),
]


def repeated(counts: dict[str, int]) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(("prediction", "counts", "expected"), OFFICIAL)
def test_official_equals_the_published_script(prediction: str, counts: dict[str, int], expected: float) -> None:
    references = repeated(counts)
    assert round(vqa_accuracy(prediction, references), 2) == expected
    assert round(vqa_accuracy(prediction, references[::-1], "official"), 2) == expected


@pytest.mark.parametrize("row", COMPARED)
def test_each_metric_equals_its_published_script(
    row: tuple[str, dict[str, int], float, float, float, float],
) -> None:
    prediction, counts, *expected = row
    for references in (repeated(counts), repeated(counts)[::-1]):
        assert [round(vqa_accuracy(prediction, references, metric), 2) for metric in SCRIPTS] == expected


def test_lavis_and_lmms_eval_ignore_period_and_case_if_all_references_agree() -> None:
    accuracies = {metric: vqa_accuracy("Yes.", ["yes"] * 10, metric) for metric in METRICS}
    assert accuracies == {"official": 0, "lavis": 100, "lmms-eval": 100, "a-okvqa": 0, "exact": 0}


def test_lavis_scores_some_unanimous_references_0() -> None:
    answers = ("two", "none", "the cat", "Yes", "dont", "x-ray", "1,000", "u.s.a.")
    assert [vqa_accuracy(answer, [answer] * 10, "lavis") for answer in answers] == [0] * len(answers)
    assert [vqa_accuracy(answer, [answer] * 10) for answer in answers] == [100] * len(answers)


def test_config_allows_every_metric() -> None:
    assert get_args(EvaluateConfig.model_fields["metric"].annotation) == tuple(METRICS)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_official_accuracies_with_ten_references_are_whole_numbers(matches: int, expected: int) -> None:
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == expected


def test_official_is_not_rounded() -> None:
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx(400 / 9, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("yes", ["yes"], 100),
        (" Yes\n", ["yes "], 100),
        ("gray", ["blue", "Gray"], 100),
        ("no", ["yes"], 0),
        ("yes.", ["yes"], 0),
        ("the cat", ["cat"], 0),
        ("two", ["2"], 0),
        ("", ["yes"], 0),
    ],
)
def test_exact_ignores_only_surrounding_spaces_and_case(
    prediction: str, references: list[str], expected: float
) -> None:
    assert vqa_accuracy(prediction, references, "exact") == expected


def test_single_reference_scores_0_with_official_and_100_with_exact() -> None:
    assert vqa_accuracy("yes", ["yes"], "official") == 0
    assert vqa_accuracy("yes", ["yes"], "exact") == 100


def test_unknown_metric_error_lists_the_allowed_ones() -> None:
    with pytest.raises(PipelineError, match=r"'oficial'.*official, lavis, lmms-eval, a-okvqa, exact"):
        vqa_accuracy("yes", ["yes"], "oficial")


@pytest.mark.parametrize("metric", METRICS)
def test_no_references_is_an_error(metric: str) -> None:
    with pytest.raises(PipelineError, match="no references"):
        vqa_accuracy("yes", [], metric)

"""Published dataset formats are read, and errors name what is wrong with a file."""

import gc
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.common.errors import PipelineError
from pipeline.data.examples import SkippedItem, Split, VQAExample
from pipeline.data.vqa import read_examples

LINE = {"image": "a.png", "question": "what color?", "answer": "red"}
QUESTION = {"question_id": 42, "image_id": 9, "question": "what color is the car?"}
ANNOTATION = {
    "question_id": 42,
    "image_id": 9,
    "question_type": "what color is the",
    "answer_type": "other",
    "multiple_choice_answer": "red",
    "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
}


def write_jsonl(folder: Path, *lines: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def split_of_jsonl(path: Path, split: str = "train") -> Split:
    return read_examples("jsonl", split, annotations=path, images=Path("images"))


def read_jsonl(path: Path, split: str = "train") -> list[VQAExample]:
    """Return the examples of a file without skipped items."""
    examples, skipped = split_of_jsonl(path, split)
    assert skipped == []
    return examples


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def read_vqav2(
    folder: Path, questions: list[Any], annotations: list[Any] | None, split: str = "val", subtype: str = "val2014"
) -> Split:
    asked = write_json(folder / "questions.json", {"data_subtype": subtype, "questions": questions})
    answered = None
    if annotations is not None:
        answered = write_json(folder / "annotations.json", {"data_subtype": subtype, "annotations": annotations})
    return read_examples("vqav2", split, annotations=answered, images=Path("coco"), questions=asked)


@pytest.fixture
def install_easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], Path]:
    """Install an `easy_vqa` package with the given training questions, which hides the real one."""

    def install(questions: object) -> Path:
        data = tmp_path / "easy_vqa" / "data" / "train"
        data.mkdir(parents=True)
        (tmp_path / "easy_vqa" / "__init__.py").write_text("raise RuntimeError('its code must not run')\n")
        write_json(data / "questions.json", questions)
        monkeypatch.syspath_prepend(str(tmp_path))
        return data

    return install


# ---- examples


@pytest.mark.parametrize(
    ("answers", "target"),
    [(("red",), "red"), (("red", "blue", "blue"), "blue"), (("red", "blue", "blue", "red", "gray"), "red")],
)
def test_target_is_the_first_most_common_answer(answers: tuple[str, ...], target: str) -> None:
    assert VQAExample(1, Path("a.png"), "what color?", answers).target == target


def test_target_without_answers_error_names_the_question() -> None:
    with pytest.raises(PipelineError, match="77"):
        _ = VQAExample(77, Path("a.png"), "what color?", ()).target


@pytest.mark.parametrize(
    "example",
    [
        VQAExample(3, Path("/images/ä.png"), "what?", ("red", "red", "blue"), "other", "what"),
        VQAExample("22Jb", Path("a.png"), "what?", ()),
    ],
)
def test_record_round_trips_through_json(example: VQAExample) -> None:
    assert VQAExample.from_record(json.loads(json.dumps(example.to_record()))) == example


def test_record_omits_unknown_fields() -> None:
    record = VQAExample(3, Path("x/a.png"), "what?", ("red",)).to_record()
    assert record == {"question_id": 3, "image": "x/a.png", "question": "what?", "answers": ["red"]}


@pytest.mark.parametrize("broken", [{"answers": "red"}, {"answers": [1.5]}, {"image": None}, {"question_id": True}])
def test_invalid_record_raises(broken: dict[str, object]) -> None:
    record = VQAExample(3, Path("a.png"), "what?", ("red",)).to_record() | broken
    with pytest.raises(PipelineError, match=next(iter(broken))):
        VQAExample.from_record(record)


# ---- jsonl


def test_jsonl_with_one_answer_with_several_and_with_everything(tmp_path: Path) -> None:
    full = {"image": "s/b.png", "question": "how many?", "answers": ["2", "3"], "question_id": "q-9"}
    types = {"answer_type": "number", "question_type": "how many"}
    assert read_jsonl(write_jsonl(tmp_path, LINE, full | types | {"unknown": 1})) == [
        VQAExample(1, Path("images/a.png"), "what color?", ("red",)),
        VQAExample("q-9", Path("images/s/b.png"), "how many?", ("2", "3"), "number", "how many"),
    ]


def test_jsonl_default_ids_are_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(LINE) + "\n\n  \r\n" + json.dumps(LINE), encoding="utf-8")
    assert [example.question_id for example in read_jsonl(path)] == [1, 4]


def test_jsonl_keeps_unusual_characters_and_accepts_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    question = "wie groß\u2028ist\u0085das 🙂?"
    path.write_text(json.dumps(LINE | {"question": question}, ensure_ascii=False), encoding="utf-8-sig")
    assert [example.question for example in read_jsonl(path)] == [question]


@pytest.mark.parametrize("none", [{}, {"answers": []}, {"answers": [], "answer": "red"}])
def test_jsonl_of_a_test_split_may_lack_answers_and_of_another_may_not(tmp_path: Path, none: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path, LINE, {"image": "b.png", "question": "what color?"} | none)
    assert [example.answers for example in read_jsonl(path, split="test")] == [("red",), ()]
    examples, skipped = split_of_jsonl(path, split="train")
    assert [example.question_id for example in examples] == [1]
    assert skipped == [SkippedItem("train", "no answer", f"{path}: line 2", 2, "images/b.png")]


def test_jsonl_keeps_the_first_of_duplicate_questions(tmp_path: Path) -> None:
    later = [LINE | {"question_id": "a", "question": text, "image": f"{text}.png"} for text in ("b", "c")]
    path = write_jsonl(tmp_path, LINE | {"question_id": "a"}, later[0], LINE, later[1])
    examples, skipped = split_of_jsonl(path)
    assert [(example.question_id, example.question) for example in examples] == [
        ("a", "what color?"),
        (3, LINE["question"]),
    ]
    assert skipped == [
        SkippedItem("train", "duplicate question_id", f"{path}: line 2", "a", "images/b.png"),
        SkippedItem("train", "duplicate question_id", f"{path}: line 4", "a", "images/c.png"),
    ]


def test_integer_and_text_ids_are_different(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, LINE | {"question_id": 7}, LINE | {"question_id": "7"})
    assert [example.question_id for example in read_jsonl(path)] == [7, "7"]


def test_question_without_answer_does_not_shadow_a_duplicate(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, LINE | {"question_id": 7, "answers": []}, LINE | {"question_id": 7})
    examples, skipped = split_of_jsonl(path)
    assert [example.answers for example in examples] == [("red",)]
    assert [(item.reason, item.where) for item in skipped] == [("no answer", f"{path}: line 1")]


def test_malformed_line_after_skipped_lines_raises(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, LINE, LINE | {"answers": []}, LINE | {"question_id": 1}, LINE | {"question": 3})
    with pytest.raises(PipelineError, match=r"line 4: 'question' is an integer"):
        read_jsonl(path)


@pytest.mark.parametrize("name", ["a {} b", "{0}", "{"])
def test_braces_in_a_path_are_kept(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    path = write_jsonl(folder, LINE, LINE | {"answers": []})
    assert [item.where for item in split_of_jsonl(path).skipped] == [f"{path}: line 2"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"question": None}, "'question' is null, not text"),
        ({"image": 3}, "'image' is an integer, not text"),
        ({"answer": True}, '\'answer\' is a boolean, not text; write "yes" or "no"'),
        ({"answer": {"text": "red"}}, "'answer' is an object, not text"),
        ({"answers": ["red", 2.5]}, r"'answers\[1\]' is a float"),
        ({"answers": ["red", None]}, r"'answers\[1\]' is null, not text"),
        ({"question_id": True}, "'question_id' is a boolean"),
        ({"question_id": 1.0}, "'question_id' is a float"),
        ({"answer_type": 1}, "'answer_type' is an integer"),
    ],
)
def test_malformed_line_error_names_the_problem(tmp_path: Path, broken: dict[str, object], message: str) -> None:
    path = write_jsonl(tmp_path, LINE, LINE | broken)
    with pytest.raises(PipelineError, match=rf"train\.jsonl: line 2: .*{message}"):
        read_jsonl(path)


@pytest.mark.parametrize("missing", ["image", "question"])
def test_missing_field_is_named(tmp_path: Path, missing: str) -> None:
    path = write_jsonl(tmp_path, {name: value for name, value in LINE.items() if name != missing})
    with pytest.raises(PipelineError, match=f"line 1: no field '{missing}'"):
        read_jsonl(path)


def test_line_without_an_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="line 1: expected an object, found a list"):
        read_jsonl(write_jsonl(tmp_path, ["a.png", "what?", "red"], LINE))
    with pytest.raises(PipelineError, match=r"\[0\]: expected an object, found text"):
        read_jsonl(write_jsonl(tmp_path, ["a.png", "what?", "red"]))


def test_absolute_image_name_raises(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"line 1: image '/data/a\.png' must be relative to the images folder"):
        read_jsonl(write_jsonl(tmp_path, LINE | {"image": "/data/a.png"}))


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "s/../../a.png", "..", "", ".", "a\0.png"])
def test_image_name_outside_the_folder_raises(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path, LINE, LINE | {"image": name})
    with pytest.raises(PipelineError, match=r"line 2: image .* images"):
        read_jsonl(path)


def test_two_dots_within_a_name_are_allowed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, LINE | {"image": "a..b/..c.png"})
    assert read_jsonl(path)[0].image == Path("images/a..b/..c.png")


# ---- files


def test_invalid_json_error_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(LINE) + '\n{"image": "a.png",}\n')
    with pytest.raises(PipelineError, match=r"train\.jsonl: not JSON at line 2, column 1\d"):
        read_jsonl(path)
    path.write_text('{\n "questions": [],\n oh\n}')
    with pytest.raises(PipelineError, match=r"train\.jsonl: not JSON at line 3, column 2"):
        read_examples("vqav2", "test", images=Path("coco"), questions=path)


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 10_000])
def test_json_beyond_python_limits_raises(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"train\.jsonl: .*line 1"):
        read_jsonl(path)


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"question": "gr\xfcn?"}')
    with pytest.raises(PipelineError, match=r"train\.jsonl: not UTF-8 at byte 16"):
        read_jsonl(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"gone\.jsonl: cannot be read: No such file"):
        read_jsonl(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("format", "given", "key"),
    [
        ("jsonl", {"images"}, "annotations"),
        ("jsonl", {"annotations"}, "images"),
        ("vqav2", {"images", "annotations"}, "questions"),
        ("vqav2", {"questions", "annotations"}, "images"),
        ("vqav2", {"questions", "images"}, "annotations"),
    ],
)
def test_required_file_is_named_by_its_config_key(format: str, given: set[str], key: str) -> None:
    with pytest.raises(PipelineError, match=rf"data\.train\.{key} "):
        read_examples(format, "train", **{name: Path(name) for name in given})


def test_no_questions_raise(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"data\.train: no questions in .*train\.jsonl"):
        read_jsonl(write_jsonl(tmp_path))
    with pytest.raises(PipelineError, match=r"data\.val: no questions in .*questions\.json"):
        read_vqav2(tmp_path, [], [])


def test_split_with_only_skipped_questions_raises(tmp_path: Path) -> None:
    unanswered = write_jsonl(tmp_path, LINE | {"answers": []}, LINE | {"answers": []})
    message = r"data\.train: no valid questions in .*train\.jsonl: 2 skipped, the last one at .*line 2: no answer"
    with pytest.raises(PipelineError, match=message):
        read_jsonl(unanswered)
    for split in "val", "test":
        with pytest.raises(PipelineError, match=r"1 skipped, .*questions\[0\]: no annotation in .*annotations\.json"):
            read_vqav2(tmp_path, [QUESTION], [], split=split)


def test_unknown_format_error_suggests_the_nearest() -> None:
    with pytest.raises(PipelineError, match=r"'vqa_v2'; did you mean vqav2\? Allowed: easy_vqa, jsonl, vqav2"):
        read_examples("vqa_v2", "train")


def test_reading_restores_garbage_collection(tmp_path: Path) -> None:
    with pytest.raises(PipelineError):
        read_jsonl(tmp_path / "gone.jsonl")
    assert gc.isenabled()
    gc.disable()
    try:
        read_jsonl(write_jsonl(tmp_path, LINE))
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- VQAv2 and OK-VQA


def test_vqav2_joins_on_the_question_id_and_keeps_all_answers(tmp_path: Path) -> None:
    second = QUESTION | {"question_id": 7, "image_id": 581929, "question": "is it day?"}
    answers = [{"answer": text, "answer_id": i, "raw_answer": text} for i, text in enumerate(["yes", "no"] * 5, 1)]
    annotated = ANNOTATION | {"question_id": 7, "answer_type": "yes/no", "question_type": "is it", "answers": answers}
    unasked = ANNOTATION | {"question_id": 1}
    examples, skipped = read_vqav2(tmp_path, [QUESTION, second], [annotated, unasked, ANNOTATION])
    assert skipped == []
    assert examples == [
        VQAExample(
            question_id=42,
            image=Path("coco/COCO_val2014_000000000009.jpg"),
            question="what color is the car?",
            answers=("red",) * 10,
            answer_type="other",
            question_type="what color is the",
        ),
        VQAExample(
            question_id=7,
            image=Path("coco/COCO_val2014_000000581929.jpg"),
            question="is it day?",
            answers=("yes", "no") * 5,
            answer_type="yes/no",
            question_type="is it",
        ),
    ]


def test_vqav2_annotations_may_carry_fields_of_their_own(tmp_path: Path) -> None:
    examples, _ = read_vqav2(tmp_path, [QUESTION | {"answer": "red"}], [ANNOTATION | {"answer": "red"}])
    assert [example.answers for example in examples] == [("red",) * 10]


def test_vqav2_test_splits_have_no_annotations_and_test_dev_has_the_images_of_test(tmp_path: Path) -> None:
    expected = [VQAExample(42, Path("coco/COCO_test2015_000000000009.jpg"), "what color is the car?", ())]
    assert read_vqav2(tmp_path, [QUESTION], None, split="test", subtype="test2015") == (expected, [])
    assert read_vqav2(tmp_path, [QUESTION], None, split="test-dev", subtype="test-dev2015") == (expected, [])


def test_vqav2_lists_skipped_items_with_file_and_position(tmp_path: Path) -> None:
    questions = [QUESTION | {"question_id": key, "image_id": key} for key in (42, 1, 42, 2)]
    questions.append(QUESTION | {"question_id": "42"})
    other = ANNOTATION | {"answers": [{"answer": "blue"}]}
    unanswered = ANNOTATION | {"question_id": 2, "answers": []}
    examples, skipped = read_vqav2(tmp_path, questions, [ANNOTATION, other, unanswered])
    assert [(example.question_id, example.answers) for example in examples] == [(42, ("red",) * 10)]
    asked, answered = tmp_path / "questions.json", tmp_path / "annotations.json"
    image = "coco/COCO_val2014_0000000000{:02d}.jpg".format
    assert skipped == [
        SkippedItem("val", "duplicate annotation", f"{answered}: annotations[1]", 42, questions=0),
        SkippedItem("val", f"no annotation in {answered}", f"{asked}: questions[1]", 1, image(1)),
        SkippedItem("val", "duplicate question_id", f"{asked}: questions[2]", 42, image(42)),
        SkippedItem("val", "no answer", f"{asked}: questions[3]", 2, image(2)),
        SkippedItem("val", f"no annotation in {answered}", f"{asked}: questions[4]", "42", image(9)),
    ]


def test_vqav2_test_split_with_annotations_keeps_unanswered_questions_but_not_those_without_annotation(
    tmp_path: Path,
) -> None:
    questions = [QUESTION, QUESTION | {"question_id": 1}, QUESTION | {"question_id": 2}]
    annotations = [ANNOTATION, ANNOTATION | {"question_id": 1, "answers": []}]
    examples, skipped = read_vqav2(tmp_path, questions, annotations, split="test")
    assert [(example.question_id, len(example.answers)) for example in examples] == [(42, 10), (1, 0)]
    assert [(item.question_id, item.reason) for item in skipped] == [
        (2, f"no annotation in {tmp_path / 'annotations.json'}")
    ]


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([QUESTION | {"question_id": None}], [ANNOTATION], r"questions\.json: questions\[0\]: 'question_id' is null"),
        ([QUESTION], [ANNOTATION, {"answers": []}], r"annotations\.json: annotations\[1\]: no field 'question_id'"),
        ([QUESTION | {"image_id": "9"}], [ANNOTATION], r"questions\[0\]: 'image_id' is text, not an integer"),
        ([QUESTION, 3], [ANNOTATION], r"questions\[1\]: expected an object, found an integer"),
        ([QUESTION], [ANNOTATION | {"answers": {}}], r"annotations\[0\]: 'answers' is an object, not a list"),
        ([QUESTION], [ANNOTATION | {"answers": [{"answer": 2.5}]}], r"annotations\[0\]: 'answer' is a float"),
        ([QUESTION], [ANNOTATION | {"answers": [{"raw": "x"}]}], r"annotations\[0\]: no field 'answer'"),
        ([QUESTION], [ANNOTATION | {"answers": [None]}], r"annotations\[0\]: expected an object, found null"),
        ([QUESTION], [{"question_id": 42}], r"annotations\[0\]: no field 'answers'"),
    ],
)
def test_vqav2_error_names_file_and_record(
    tmp_path: Path, questions: list[Any], annotations: list[Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        read_vqav2(tmp_path, questions, annotations)


def test_vqav2_detects_a_file_of_another_format(tmp_path: Path) -> None:
    other = write_json(tmp_path / "other.json", {"questions": [QUESTION]})
    with pytest.raises(PipelineError, match=r"other\.json: no field 'data_subtype'"):
        read_examples("vqav2", "test", images=Path("coco"), questions=other)


# ---- easy-VQA


def test_easy_vqa_is_read_from_the_package_without_running_it(install_easy_vqa: Callable[[object], Path]) -> None:
    data = install_easy_vqa([["what color is it?", "teal", 5], ["is it red?", "no", 0]])
    examples = [
        VQAExample(0, data / "images" / "5.png", "what color is it?", ("teal",), "other"),
        VQAExample(1, data / "images" / "0.png", "is it red?", ("no",), "yes/no"),
    ]
    assert read_examples("easy_vqa", "train") == (examples, [])


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([["what?", "red", 0], ["what?", "red"]], r"questions\.json: \[1\]: not a list of question"),
        ([["what?", "red", "0"]], r"questions\.json: \[0\]: 'image id' is text"),
        ({}, r"questions\.json: expected a list"),
        ([], r"data\.train: no questions in easy_vqa"),
    ],
)
def test_damaged_easy_vqa_raises(install_easy_vqa: Callable[[object], Path], questions: object, message: str) -> None:
    install_easy_vqa(questions)
    with pytest.raises(PipelineError, match=message):
        read_examples("easy_vqa", "train")


def test_easy_vqa_has_only_two_splits() -> None:
    with pytest.raises(PipelineError, match="train and test, not 'val'"):
        read_examples("easy_vqa", "val")


def test_missing_easy_vqa_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(PipelineError, match="pip install easy-vqa"):
        read_examples("easy_vqa", "train")


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="the easy-vqa package is not installed")
@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38575, 4000), ("test", 9673, 1000)])
def test_published_easy_vqa_is_read(split: str, questions: int, images: int) -> None:
    examples, skipped = read_examples("easy_vqa", split)
    assert (len(examples), skipped) == (questions, [])
    assert len({example.target for example in examples}) == 13
    paths = {example.image for example in examples}
    assert len(paths) == images
    assert all(path.is_file() for path in paths)


def test_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"image": "a.png", "question": "what? \\ud800", "answer": "x"}')
    with pytest.raises(PipelineError, match=r"line 1: 'question' contains half of a surrogate pair"):
        read_examples("jsonl", "train", annotations=path, images=tmp_path)

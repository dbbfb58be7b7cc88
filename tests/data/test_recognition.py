"""Errors for a wrong data.format suggest the right one."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import published
import pytest

from pipeline.common.errors import ConfigError, PipelineError
from pipeline.data.recognition import DetectedFormat, detect_format, suggest_format
from pipeline.data.sources import Sources
from pipeline.data.vqa import read_examples

ONE_FILE = [name for name in published.TRAIN if "questions" not in published.TRAIN[name]]


def error_of(format: str, split: str = "train", **paths: Path) -> str:
    with pytest.raises(PipelineError) as error:
        read_examples(format, split, images=Path("images"), **paths)
    return str(error.value)


@pytest.mark.parametrize(("mine", "given"), sorted({*permutations(ONE_FILE, 2)} - {("lavis", "jsonl")}))  # both read it
@pytest.mark.parametrize("split", ["train", "test"])
def test_detected_format_is_suggested(tmp_path: Path, mine: str, given: str, split: str) -> None:
    path = published.write(tmp_path, mine, published.TRAIN[mine])["annotations"]
    message = error_of(given, split, annotations=path)
    assert message.startswith(f"{path}: this looks like {mine}, not {given}: set data.format={mine}")


@pytest.mark.parametrize("mine", ONE_FILE)
def test_file_at_a_vqav2_key_is_suggested_its_own_format(tmp_path: Path, mine: str) -> None:
    path = published.write(tmp_path, mine, published.TRAIN[mine])["annotations"]
    message = error_of("vqav2", questions=path, annotations=path)
    assert f"{path}: this looks like {mine}, not vqav2: set data.format={mine}" in message
    assert f"data.format={mine} and data.train.annotations to this file" in message


@pytest.mark.parametrize("given", ONE_FILE)
@pytest.mark.parametrize("data_set", ["vqav2", "okvqa"])
@pytest.mark.parametrize("key", ["questions", "annotations"])
def test_vqav2_and_okvqa_files_are_detected(tmp_path: Path, given: str, data_set: str, key: str) -> None:
    path = published.write(tmp_path, data_set, published.TRAIN[data_set])[key]
    message = error_of(given, annotations=path)
    assert message.startswith(f"{path}: this looks like vqav2's {key}, not {given}: set data.format=vqav2")
    assert ("data.train.questions to this file" in message) == (key == "questions")


@pytest.mark.parametrize("data_set", ["vqav2", "okvqa"])
def test_swapped_questions_and_annotations_are_detected(tmp_path: Path, data_set: str) -> None:
    paths = published.write(tmp_path, data_set, published.TRAIN[data_set])
    questions, annotations = paths["questions"], paths["annotations"]
    message = error_of("vqav2", questions=annotations, annotations=questions)
    assert f"{questions}: this looks like vqav2's questions, not its annotations: set data.train.questions" in message
    assert f"{annotations}: this looks like vqav2's annotations, not its questions: set data.train.ann" in message
    assert f"{annotations}: this looks like" in error_of("vqav2", "test", questions=annotations)


def test_custom_list_or_table_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "a.png", "question": "what?", "answers": ["red"]}]))
    assert "this looks like jsonl, not lavis: set data.format=jsonl" in error_of("lavis", annotations=path)
    path = tmp_path / "train.csv"
    path.write_text("image;question;answer\na.png;what?;red")
    assert "this looks like jsonl, not vizwiz: set data.format=jsonl" in error_of("vizwiz", annotations=path)


def test_broken_custom_list_is_not_detected_as_lavis(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[{"image": "a.png", "question": "what?", "answer": "red"},]')
    assert error_of("jsonl", annotations=path).startswith(f"{path}: not JSON at line 1")


RAD = {"qid": 1, "image_name": "0.png", "question": "what?", "answer": "red"}
LLAVA = {"id": "0", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}]}


@pytest.mark.parametrize("given", ["jsonl", "lavis", "vqav2"])
@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        (RAD, "rename image_name to image and qid to question_id; then set data.format=jsonl"),
        ({"img": "0.png", "q": "what?", "a": "red"}, "rename img to image and q to question"),
        (LLAVA, "this looks like LLaVA's conversations: write one record with image, question and answer for each"),
    ],
)
def test_nearly_valid_records_get_a_remedy(tmp_path: Path, record: dict[str, object], remedy: str, given: str) -> None:
    path = tmp_path / "train.json"
    texts = [json.dumps([record] * 2), json.dumps([record], indent=2), json.dumps(record)]
    if record is not LLAVA:
        texts.append("\t".join(record) + "\r\n" + "\t".join(map(str, record.values())) + "\r\n")
    for text in texts:
        path.write_text(text)
        assert error_of(given, annotations=path, questions=path).startswith(f"{path}: {remedy}")


def test_reader_error_is_kept(tmp_path: Path) -> None:
    path = published.write(tmp_path, "textvqa", published.TRAIN["textvqa"])["annotations"]
    assert error_of("lavis", annotations=path).endswith(
        f"set data.format=textvqa ({path}: expected a list, found an object)"
    )


def test_unknown_format_is_a_config_error(tmp_path: Path) -> None:
    path = published.write(tmp_path, "lavis", published.TRAIN["lavis"])["annotations"]
    with pytest.raises(ConfigError, match="did you mean lavis"):
        read_examples("lavi", "train", annotations=path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_of_the_configured_format_get_no_suggestion(tmp_path: Path, split: str) -> None:
    """Yield damaged files: truncated at some position, or with an invalid last record."""
    for data_set, files in (published.TRAIN if split == "train" else published.TEST).items():
        paths = published.write(tmp_path / data_set, data_set, files)
        for key, path in paths.items():
            text = path.read_text()
            for broken in text[: len(text) // 2], text[:-3], text.replace("question", "query"), "", "[]", "{}", "\0":
                path.write_text(broken)
                sources = Sources(split, **paths)
                assert suggest_format(published.format_of(data_set), sources) is None, (data_set, key, broken[:40])
            path.write_text(text)


@pytest.mark.parametrize("data_set", published.TEST)
def test_every_published_file_is_detected(tmp_path: Path, data_set: str) -> None:
    for files in published.TRAIN[data_set], published.TEST[data_set]:
        for key, path in published.write(tmp_path, data_set, files).items():
            assert detect_format(path) == DetectedFormat(data_set, key)


def test_head_of_a_large_file_suffices(tmp_path: Path) -> None:
    many = [published.COCO_CAPTIONS["images"][0]] * 10_000  # type: ignore[index]
    captions: dict[str, Any] = published.COCO_CAPTIONS | {"images": many}
    path = published.write(tmp_path, "coco_captions", {"annotations": captions})["annotations"]
    assert detect_format(path) == DetectedFormat("coco_captions")
    record = published.VIZWIZ[0] | {"answers": 0}
    record = {name: record[name] for name in sorted(record, reverse=True)} | {"answers": [{"answer": "é" * 300}] * 9000}
    assert detect_format(
        published.write(tmp_path, "vizwiz", {"annotations": [record]})["annotations"]
    ) == DetectedFormat("vizwiz")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 3_000_000, b'{"a":' * 500_000, b" " * 2_000_000, b'["a', b"3"])
def test_unknown_files_are_not_detected(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "odd"
    path.write_bytes(data)
    assert detect_format(path) is None
    assert detect_format(tmp_path) is detect_format(tmp_path / "gone") is None


@pytest.mark.parametrize("broken", ['[{"image": "0.png", "question": "q", "answer": "a"},]',
                                    '[{"image": "0.png", "question": "q", "answer": 0.5}]'])  # fmt: skip
def test_error_in_a_custom_list_has_no_suggestion(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(broken)
    assert error_of("jsonl", annotations=path).startswith(f"{path}: ")
    assert "looks like" not in error_of("jsonl", annotations=path)


def test_list_inside_an_object_is_found(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": 1, "data": [{"image": "0.png", "question": "q", "answer": "a"}]}))
    assert "keep only the list at 'data' in the file; then set data.format=jsonl" in error_of("jsonl", annotations=path)


def test_records_without_answers_are_not_detected_as_vizwiz(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "0.png", "question": "q", "label": "a"}]))
    assert "looks like" not in error_of("jsonl", annotations=path)
    assert "no answer" in error_of("jsonl", annotations=path)

"""Damaged annotation files of every format raise an error with a position, or are counted as skipped.

`ACCEPTED` repeats what the reader of each format accepts: the types allowed at each location. Every location of every
published file is damaged in turn. Locations that are not in `ACCEPTED` must not matter.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import published
import pytest

from pipeline.common.errors import PipelineError
from pipeline.data.examples import Split, VQAExample
from pipeline.data.sources import Sources
from pipeline.data.vqa import FORMATS, Format, read_examples

Location = tuple[str | int, ...]

_VQAV2 = {
    "questions": {
        "": "object",
        "data_subtype": "text",
        "questions": "list",
        "questions.*": "object",
        "questions.*.question_id": "whole text",
        "questions.*.image_id": "whole",
        "questions.*.question": "text",
    },
    "annotations": {
        "": "object",
        "annotations": "list",
        "annotations.*": "object",
        "annotations.*.question_id": "whole text",
        "annotations.*.answers": "list",
        "annotations.*.answers.*": "object text",
        "annotations.*.answers.*.answer": "text whole",
        "annotations.*.answer_type": "text null missing",
        "annotations.*.question_type": "text null missing",
    },
}
ACCEPTED: dict[str, dict[str, dict[str, str]]] = {
    "jsonl": {
        "annotations": {
            "*": "object",
            "*.image": "text",
            "*.question": "text",
            "*.answer": "text whole list null missing",
            "*.answers": "text whole list null missing",
            "*.answers.*": "text whole",
            "*.question_id": "whole text missing",
            "*.answer_type": "text null missing",
        }
    },
    "vqav2": _VQAV2,
    "okvqa": _VQAV2,
    "aokvqa": {
        "annotations": {
            "": "list",
            "*": "object",
            "*.question_id": "text",
            "*.image_id": "whole",
            "*.question": "text",
            "*.direct_answers": "list missing",
            "*.direct_answers.*": "text whole",
            "*.difficult_direct_answer": "truth",
        }
    },
    "vizwiz": {
        "annotations": {
            "": "list",
            "*": "object",
            "*.image": "text",
            "*.question": "text",
            "*.answers": "list missing",
            "*.answers.*": "object",
            "*.answers.*.answer": "text whole",
            "*.answer_type": "text null missing",
        }
    },
    "textvqa": {
        "annotations": {
            "": "object",
            "data": "list",
            "data.*": "object",
            "data.*.question_id": "whole",
            "data.*.image_id": "text",
            "data.*.question": "text",
            "data.*.answers": "list missing",
            "data.*.answers.*": "text whole",
        }
    },
    "gqa": {
        "annotations": {
            "": "object",
            "*": "object",
            "*.imageId": "text",
            "*.question": "text",
            "*.answer": "text whole list null missing",
            "*.types": "object missing",
            "*.types.structural": "text null missing",
            "*.types.semantic": "text null missing",
        }
    },
    "lavis": {
        "annotations": {
            "": "list",
            "*": "object",
            "*.question_id": "whole text missing",
            "*.image": "text",
            "*.question": "text",
            "*.answer": "text whole list null missing",
            "*.answer.*": "text whole",
        }
    },
    "coco_captions": {
        "annotations": {
            "": "object",
            "images": "list",
            "images.*": "object",
            "images.*.id": "whole",
            "images.*.file_name": "text",
            "annotations": "list",
            "annotations.*": "object",
            "annotations.*.image_id": "whole",
            "annotations.*.caption": "text whole",
        }
    },
}
KINDS = {dict: "object", list: "list", str: "text", bool: "truth", int: "whole", float: "fraction", type(None): "null"}
MISSING = object()
DAMAGES = [MISSING, None, True, 3, 10**40, 2.5, "text", "", "\0", "../x", "\ud800", [], [3], [[[]]], {}, {"a": 1}]
FILES = [(data_set, key) for data_set, files in published.TRAIN.items() for key in files]


def read(data_set: str, paths: dict[str, Path]) -> Split | str:
    """Return what is read, or the message of the error; other exceptions are raised."""
    try:
        return read_examples(published.format_of(data_set), "train", images=Path("images"), **paths)
    except PipelineError as error:
        return str(error)


def locations(value: object, at: Location = ()) -> Iterator[Location]:
    """Return every location in a JSON value, of lists only the first two items."""
    yield at
    items = enumerate(value[:2]) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for name, item in items:
        yield from locations(item, (*at, name))


def damaged(content: Any, at: Location, damage: object) -> Any:
    if not at:
        return damage
    content = copy.deepcopy(content)
    inside = content
    for name in at[:-1]:
        inside = inside[name]
    if damage is MISSING:
        del inside[at[-1]]
    else:
        inside[at[-1]] = damage
    return content


def pattern(data_set: str, at: Location) -> str:
    names = ["*" if isinstance(name, int) else name for name in at]
    return ".".join(["*", *names[1:]] if data_set == "gqa" and names else names)


def place(data_set: str, at: Location) -> str:
    """Return the position of the record that contains a location, as in error messages."""
    if data_set == "jsonl":
        return f"line {int(at[0]) + 1}: "
    if data_set == "gqa":
        return f"{at[0]}: "
    return f"[{at[0]}]: " if isinstance(at[0], int) else f"{at[0]}[{at[1]}]: "


def records(data_set: str, content: Any) -> Any:
    """Return the questions, or their images."""
    name = {"vqav2": "questions", "okvqa": "questions", "textvqa": "data", "coco_captions": "images"}.get(data_set)
    return content if name is None else content[name]


def check_every_place(folder: Path, data_set: str, key: str) -> None:
    files, taken = published.TRAIN[data_set], ACCEPTED[data_set][key]
    paths = published.write(folder, data_set, files)
    whole = read(data_set, paths)
    assert isinstance(whole, Split)
    for at in locations(files[key]):
        kinds = taken.get(pattern(data_set, at), "").split()
        for damage in DAMAGES:
            if at == () and (damage is MISSING or data_set == "jsonl"):
                continue
            content = damaged(files[key], at, damage)
            paths[key].write_text(published.spell(data_set, content))
            found = read(data_set, paths)
            seen = f"{data_set}.{key} {at} = {damage!r}: {found}"
            item_is_gone = damage is MISSING and at and (isinstance(at[-1], int) or pattern(data_set, at) == "*")
            if not kinds:
                assert found == whole, seen
            elif (KINDS.get(type(damage), "missing") not in kinds) and not item_is_gone:
                assert isinstance(found, str), seen
                assert f"{paths[key]}: " in found, seen
                assert "*" not in pattern(data_set, at) or place(data_set, at) in found, seen
            elif isinstance(found, str):
                assert str(paths[key]) in found or str(paths.get("questions")) in found, seen
            else:
                check_all_are_counted(data_set, files | {key: content}, found, seen)
                if at and "*" in pattern(data_set, at) and not item_is_gone:
                    assert sum(example not in found.examples for example in whole.examples) <= 1, seen


def check_all_are_counted(data_set: str, files: dict[str, Any], found: Split, seen: str) -> None:
    asked = records(data_set, files.get("questions", files["annotations"]))
    assert len(found.examples) + sum(one.questions for one in found.skipped) == len(asked), seen
    json.dumps([example.to_record() for example in found.examples], ensure_ascii=False).encode()


@pytest.mark.parametrize(("data_set", "key"), FILES)
def test_damage_at_every_position(tmp_path: Path, data_set: str, key: str) -> None:
    check_every_place(tmp_path, data_set, key)


@pytest.mark.parametrize(("data_set", "key"), FILES)
def test_truncated_file_is_named(tmp_path: Path, data_set: str, key: str) -> None:
    paths = published.write(tmp_path, data_set, published.TRAIN[data_set])
    text = paths[key].read_text().rstrip()
    for end in {*range(0, len(text), 29), *range(len(text) - 20, len(text))}:
        paths[key].write_text(text[:end])
        found = read(data_set, paths)
        if data_set == "jsonl" and text[end] == "\n":
            assert isinstance(found, Split)
        else:
            assert isinstance(found, str), end
            assert str(paths[key]) in found, end


@pytest.mark.parametrize(("data_set", "key"), FILES)
def test_invalid_utf8_at_every_position_is_named(tmp_path: Path, data_set: str, key: str) -> None:
    paths = published.write(tmp_path, data_set, published.TRAIN[data_set])
    data = paths[key].read_bytes()
    for at in range(0, len(data), 97):
        paths[key].write_bytes(data[:at] + b"\xff" + data[at:])
        assert f"{paths[key]}: not UTF-8 at byte {at}" in str(read(data_set, paths))


@pytest.mark.parametrize(("data_set", "key"), FILES)
def test_random_byte_changes_are_an_error_or_counted(tmp_path: Path, data_set: str, key: str) -> None:
    rng = random.Random(0)
    files = published.TRAIN[data_set]
    paths = published.write(tmp_path, data_set, files)
    data = paths[key].read_bytes()
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(data))] = rng.choice(b'{}[]",:0-\\ntfe \n\x00\x80')
        paths[key].write_bytes(changed)
        found = read(data_set, paths)
        if isinstance(found, str):
            assert str(tmp_path) in found
        elif data_set != "jsonl":
            check_all_are_counted(data_set, files | {key: json.loads(changed)}, found, bytes(changed).decode())


@pytest.mark.parametrize(("data_set", "key"), FILES)
@pytest.mark.parametrize(
    "monster", ["[" * 200_000 + "]" * 200_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000]
)
def test_values_beyond_json_raise_readable_errors(tmp_path: Path, data_set: str, key: str, monster: str) -> None:
    paths = published.write(tmp_path, data_set, published.TRAIN[data_set])
    text = paths[key].read_text()
    for at in text.index(": ") + 2, text.rindex(": ") + 2:
        paths[key].write_text(text[:at] + monster + text[at:])
        assert f"{paths[key]}: " in str(read(data_set, paths))


@pytest.mark.parametrize(("data_set", "key"), FILES)
def test_duplicate_record_is_counted(tmp_path: Path, data_set: str, key: str) -> None:
    if data_set == "gqa":
        pytest.skip("its ids are keys: see test_formats")
    files = published.TRAIN[data_set]
    content = copy.deepcopy(files[key])
    repeated = content[key] if data_set in ("vqav2", "okvqa") else records(data_set, content)
    repeated.append(repeated[0])
    found = read(data_set, published.write(tmp_path, data_set, files | {key: content}))
    assert isinstance(found, Split)
    assert (len(found.examples), len(found.skipped)) == (2, 1)


MANY = 1_000_000
ANSWERS: dict[str, Location] = {
    "jsonl": (1, "answers"),
    "vqav2": ("annotations", 0, "answers"),
    "aokvqa": (0, "direct_answers"),
    "vizwiz": (0, "answers"),
    "textvqa": ("data", 0, "answers"),
    "lavis": (0, "answer"),
    "coco_captions": ("annotations",),
}


@pytest.mark.parametrize(("data_set", "at"), ANSWERS.items())
def test_a_million_answers_are_read(tmp_path: Path, data_set: str, at: Location) -> None:
    content = published.TRAIN[data_set]["annotations"]
    whole = content
    for name in at:
        whole = whole[name]
    paths = published.write(tmp_path, data_set, published.TRAIN[data_set])
    text = published.spell(data_set, damaged(content, at, ["MANY"]))
    paths["annotations"].write_text(text.replace('"MANY"', ",".join([json.dumps(whole[0])] * MANY)))
    found = read(data_set, paths)
    assert isinstance(found, Split)
    assert max(len(example.answers) for example in found.examples) == MANY


# ---- the fuzzing itself


def _careless(forgives: bool) -> Callable[[Sources], Split]:
    """Return an unsafe LAVIS reader, which trusts its input or silently drops invalid records."""

    def read(sources: Sources) -> Split:
        examples = []
        for position, record in enumerate(json.loads(sources.require("annotations").read_text())):
            if forgives and not (isinstance(record, dict) and isinstance(record.get("question"), str)):
                continue
            answers = record.get("answer", [])
            answers = (answers,) if isinstance(answers, str) else tuple(answers)
            image = Path("images", record["image"])
            examples.append(VQAExample(record.get("question_id", position), image, record["question"], answers))
        return Split(examples, [])

    return read


@pytest.mark.parametrize("forgives", [True, False])
def test_fuzzing_finds_an_unsafe_reader(tmp_path: Path, forgives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "lavis", Format(_careless(forgives)))
    with pytest.raises((AssertionError, TypeError, KeyError)):
        check_every_place(tmp_path, "lavis", "annotations")

"""Detect the format of a file by its first records, for users who set another one."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.data.record_files import find_header
from pipeline.data.sources import Sources

_HEAD = 1 << 20  # bytes read
_DEPTH = 5  # nesting of lists and objects that the head may cut: file, list, record, answers, answer
_NEXT_KEY = re.compile(r'[\s,]*"((?:[^"\\]|\\.)*)"\s*:')
_KEYS = {"vqav2": ("questions", "annotations")}  # the other formats have only annotations
_VIZWIZ_TEST = {"image", "question", "answerable", "answer_type"}
_COMPATIBLE = {("jsonl", "lavis")}  # a LAVIS file is also a valid custom list
_DECODER = json.JSONDecoder()


class DetectedFormat(NamedTuple):
    """A format, the config key of the file, and the changes that the file needs first."""

    format: str
    key: str = "annotations"
    remedy: str = ""


_CONVERSATIONS = (
    "this looks like LLaVA's conversations: write one record with image, question and answer for each question of the "
    "human and its answer, and remove <image> from the question"
)
_OTHER_NAMES = {
    "image": ("image_name", "image_path", "image_file", "img_name", "img_path", "img", "file_name", "filename"),
    "question": ("prompt", "instruction", "q"),
    "question_id": ("qid", "id"),
}


def suggest_format(format: str, sources: Sources) -> str | None:
    """Return what to set instead, if a file of `sources` seems to have another format or belong to another key."""
    suggestions = []
    for key in _KEYS.get(format, ("annotations",)):
        path: Path | None = getattr(sources, key)
        found = detect_format(path) if path else None
        if found and found != DetectedFormat(format, key) and (format, found.format) not in _COMPATIBLE:
            suggestions.append(f"{path}: {_instead(found, DetectedFormat(format, key), sources.split)}")
    return "; ".join(dict.fromkeys(suggestions)) or None


def detect_format(path: Path) -> DetectedFormat | None:
    """Return the format that a file seems to have; None if it is unknown or unreadable."""
    try:
        with path.open("rb") as file:
            text = file.read(_HEAD).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        header = find_header(text)
        return _detect_own_record(dict.fromkeys(header.names)) if header else None
    value, _ = _beginning(text, 0, _DEPTH)
    return _detect_in_object(value) if isinstance(value, dict) else _detect_in_list(_first(value))


def _instead(found: DetectedFormat, given: DetectedFormat, split: str) -> str:
    description = f"{found.format}'s {found.key}" if found.format in _KEYS else found.format
    if found.remedy:
        return f"{found.remedy}; then set data.format={found.format}"
    steps = [f"data.format={found.format}"] if found.format != given.format else []
    if found.key != given.key:
        steps.append(f"data.{split}.{found.key} to this file")
    other = given.format if found.format != given.format else f"its {given.key}"
    return f"this looks like {description}, not {other}: set {' and '.join(steps)}"


def _detect_in_list(record: Mapping[str, object]) -> DetectedFormat | None:
    if not record.keys().isdisjoint(("direct_answers", "difficult_direct_answer", "correct_choice_idx")):
        return DetectedFormat("aokvqa")
    if not {"image", "question"} <= record.keys():
        return _detect_own_record(record)
    answers = record.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], str):
        return DetectedFormat("jsonl")
    if isinstance(record.get("answer"), str):  # in LAVIS it is a list
        return DetectedFormat("jsonl")
    if "answer" in record or ("answers" not in record and "question_id" in record):
        return DetectedFormat("lavis")
    return DetectedFormat("vizwiz" if "answers" in record or record.keys() <= _VIZWIZ_TEST else "jsonl")


def _detect_in_object(whole: Mapping[str, object]) -> DetectedFormat | None:
    if {"image", "question"} <= whole.keys():
        return DetectedFormat("jsonl")
    if {"image_id", "question"} <= _first(whole.get("data")).keys():
        return DetectedFormat("textvqa")
    if {"image_id", "question"} <= _first(whole.get("questions")).keys():
        return DetectedFormat("vqav2", "questions")
    annotation = _first(whole.get("annotations"))
    if "caption" in annotation or {"id", "file_name"} <= _first(whole.get("images")).keys():
        return DetectedFormat("coco_captions")
    if {"question_id", "answers"} <= annotation.keys():
        return DetectedFormat("vqav2", "annotations")
    first = next(iter(whole.values()), None)
    if isinstance(first, dict) and {"imageId", "question"} <= first.keys():
        return DetectedFormat("gqa")
    wrapped = next((key for key, value in whole.items() if {"image", "question"} <= _first(value).keys()), None)
    if wrapped is not None:
        return DetectedFormat("jsonl", remedy=f"keep only the list at {wrapped!r} in the file")
    return _detect_own_record(whole)


def _detect_own_record(record: Mapping[str, object]) -> DetectedFormat | None:
    """Return the format of a custom record, with the keys to rename if it is nearly jsonl."""
    if "conversations" in record:
        return DetectedFormat("jsonl", remedy=_CONVERSATIONS)
    if {"image", "question"} <= record.keys():
        return DetectedFormat("jsonl")
    renamed = {name: next((other for other in others if other in record), None) for name, others in _OTHER_NAMES.items()
               if name not in record}  # fmt: skip
    if any(name not in record and not renamed[name] for name in ("image", "question")):
        return None
    names = " and ".join(f"{other} to {name}" for name, other in renamed.items() if other)
    return DetectedFormat("jsonl", remedy=f"rename {names}")


def _first(records: object) -> Mapping[str, object]:
    """Return the first of a list of records, empty if there is none."""
    record = records[0] if isinstance(records, list) and records else None
    return record if isinstance(record, dict) else {}


def _beginning(text: str, at: int, depth: int) -> tuple[object, int]:
    """Return the JSON value at a position and its end; of a truncated or broken value, the part before that."""
    while text[at : at + 1].isspace():
        at += 1
    try:
        value, end = _DECODER.raw_decode(text, at)
        return value, end
    except (ValueError, RecursionError):
        opening = text[at : at + 1] if depth else ""
    if opening == "[":
        return [_beginning(text, at + 1, depth - 1)[0]], len(text)
    found: dict[str, object] = {}
    at += 1
    while opening == "{" and (key := _NEXT_KEY.match(text, at)):
        found[key[1]], at = _beginning(text, key.end(), depth - 1)
    return found if opening == "{" else None, len(text)

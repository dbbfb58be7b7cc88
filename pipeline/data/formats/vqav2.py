"""Read VQAv2 and OK-VQA."""

from sys import intern
from typing import Any

from pipeline.data.examples import DUPLICATE_ANNOTATION, SkippedItem, Split, VQAExample
from pipeline.data.records import (
    answer_of,
    check_encodable,
    field,
    map_records,
    object_of,
    optional_text,
    parse_json,
    prefix_errors,
    question_id_of,
)
from pipeline.data.sources import Sources, collect, image_resolver

_Annotation = tuple[tuple[str, ...], str | None, str | None]  # answers, answer type, question type
_NOT_ANNOTATED: _Annotation = ((), None, None)


def read(sources: Sources) -> Split:
    """Read VQAv2 or OK-VQA: a questions file, an annotations file joined on `question_id`, and the images of COCO.

    Questions: `data_subtype, questions[]{question_id, image_id, question}`; the image is
    `COCO_{data_subtype}_{image_id:012d}.jpg`. Annotations: `annotations[]{question_id, answers[]{answer},
    question_type?, answer_type?}`; optional on a test split. Annotations of other questions are ignored. If there is an
    annotations file, questions that it does not contain are skipped, on test splits too.
    """
    path, resolve_image = sources.require("questions"), image_resolver(sources.require("images"))
    annotations, duplicates = _annotations(sources)

    def skip_reason(question_id: int | str) -> str | None:
        if annotations is None or question_id in annotations:
            return sources.skip_reason(question_id)
        return f"no annotation in {sources.annotations}"

    with prefix_errors(path):
        whole = object_of(parse_json(sources.read_text(path)))
        # test-dev is a subset of test and has its images.
        prefix = f"COCO_{field(whole, 'data_subtype', str).replace('test-dev', 'test')}"

        def example(_: int, value: object) -> VQAExample:
            record = object_of(value)
            key = question_id_of(record)
            answers, answer_type, question_type = (annotations or {}).get(key, _NOT_ANNOTATED)
            image = resolve_image(f"{prefix}_{field(record, 'image_id', int):012d}.jpg")
            return VQAExample(key, image, field(record, "question", str), answers, answer_type, question_type)

        records = enumerate(field(whole, "questions", list))
        found = collect(sources, path, "questions[{}]", records, example, skip_reason)
    return found._replace(skipped=duplicates + found.skipped)


def _annotations(sources: Sources) -> tuple[dict[int | str, _Annotation] | None, list[SkippedItem]]:
    """Return the annotations by question id, None if a test split has none, and the skipped duplicates."""
    if sources.annotations is None and sources.may_lack_answers:
        return None, []
    path = sources.require("annotations")
    annotations: dict[int | str, _Annotation] = {}
    duplicates: list[SkippedItem] = []

    def annotation(_: int, value: object) -> tuple[int | str, _Annotation]:
        record = object_of(value)
        answers = _answers(field(record, "answers", list))
        types = optional_text(record, "answer_type"), optional_text(record, "question_type")
        return question_id_of(record), (answers, *types)

    with prefix_errors(path):
        records = field(object_of(parse_json(sources.read_text(path), hook=_unwrap_answer)), "annotations", list)
        for position, (key, made) in map_records(enumerate(records), "annotations[{}]", annotation):
            if key not in annotations:
                annotations[key] = made
            else:
                where = f"{path}: annotations[{position}]"
                duplicates.append(SkippedItem(sources.split, DUPLICATE_ANNOTATION, where, key, questions=0))
    return annotations, duplicates


def _unwrap_answer(record: dict[str, Any]) -> object:
    """Replace an answer record by its answer, while the file is being parsed; return any other record as it is.

    The 4.4 million answer records of VQAv2 take 1.3 GB, while only some 200,000 answers are distinct.
    """
    answer = record.get("answer")
    return intern(answer) if type(answer) is str and "answers" not in record else record


def _answers(answers: list[Any]) -> tuple[str, ...]:
    texts = tuple([item if type(item) is str else answer_of(item) for item in answers])
    check_encodable("answer", "".join(texts))
    return texts

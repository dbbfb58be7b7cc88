"""Read GQA."""

from sys import intern
from typing import Any

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import (
    RecordError,
    answers_of,
    check_encodable,
    field,
    object_of,
    optional_text,
    parse_json,
    prefix_errors,
)
from pipeline.data.sources import Sources, collect, image_resolver

_READ = ("imageId", "question", "answer", "types")  # of a question; its scene graph and programs are ten times as large


def read(sources: Sources) -> Split:
    """Read GQA, {split}_questions.json.

    An object of question id -> `{imageId, question, answer, types?}`, no answer on test. The image is `{imageId}.jpg`.
    The short answer is read, not `fullAnswer`. The answer type is `types.structural` (verify, query, choose, logical,
    compare), the question type `types.semantic`. One file: the shards of all 14 million questions are not joined.
    """
    path, resolve_image = sources.require("annotations"), image_resolver(sources.require("images"))

    def example(question_id: str, value: object) -> VQAExample:
        check_encodable("question id", question_id)
        record = object_of(value)
        types = object_of(record.get("types", {}))
        return VQAExample(
            question_id=question_id,
            image=resolve_image(f"{field(record, 'imageId', str)}.jpg"),
            question=field(record, "question", str),
            answers=tuple(map(intern, answers_of(record, "answer"))),
            answer_type=optional_text(types, "structural"),
            question_type=optional_text(types, "semantic"),
        )

    with prefix_errors(path):
        whole = object_of(parse_json(sources.read_text(path), pairs_hook=_keep_read_fields))
        return collect(sources, path, "{}", whole.items(), example)


def _keep_read_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object without the fields that are not read, to drop them while the file is being parsed."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"duplicate key {twice!r}")
    return {name: record[name] for name in _READ if name in record} if "imageId" in record else record

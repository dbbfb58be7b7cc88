"""JSON records that people wrote: every field is checked, and an error says where it stands and what is wrong."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import PipelineError

T = TypeVar("T")

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a fraction",
    type(None): "null",
}


class RecordError(PipelineError):
    """What is wrong with a record; `each` adds its position and `naming` the file."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    try:
        yield
    except RecordError as error:
        raise PipelineError(f"{path}: {error}") from None


def each(
    records: Iterable[tuple[int, object]], place: str, make: Callable[[int, object], T]
) -> Iterator[tuple[int, T]]:
    """Each position with what `make` makes of its record; errors say the position, as `place` puts it."""
    for position, record in records:
        try:
            value = make(position, record)
        except RecordError as error:
            raise RecordError(f"{place.format(position)}: {error}") from None
        yield position, value


def parse_json(text: str, line: int = 1, hook: Callable[[dict[str, Any]], object] | None = None) -> object:
    """The JSON value of `text`, which begins on that line of its file; `hook` replaces each object."""
    try:
        value: object = json.loads(text, object_hook=hook)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise RecordError(f"not JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise RecordError(f"cannot be read as JSON, from line {line}: {error}") from None
    return value


def object_of(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise RecordError(f"not an object but {_kind(value)}")
    return value


def field(record: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = record.get(name)
    if type(value) is not kind:  # not isinstance: JSON's true is no whole number
        raise RecordError(f"{name!r} is {_kind(value)}, not {_KINDS[kind]}" if name in record else f"no field {name!r}")
    if kind is str:
        _check_encodable(name, str(value))
    return value


def _check_encodable(name: str, text: str) -> None:
    """JSON may escape half of a surrogate pair, which no tokenizer and no file name takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{name!r} holds half of a surrogate pair") from None


def optional_text(record: Mapping[str, object], name: str) -> str | None:
    return None if record.get(name) is None else field(record, name, str)


def question_id_of(record: Mapping[str, object]) -> int | str:
    value = record.get("question_id")
    return value if isinstance(value, str) else field(record, "question_id", int)


def answers_of(record: Mapping[str, object]) -> tuple[str, ...]:
    if "answers" in record:
        return texts_of(field(record, "answers", list))
    return (field(record, "answer", str),) if "answer" in record else ()


def texts_of(values: list[Any]) -> tuple[str, ...]:
    for position, value in enumerate(values):
        if type(value) is not str:
            raise RecordError(f"'answers[{position}]' is {_kind(value)}, not a text")
    return tuple(values)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)

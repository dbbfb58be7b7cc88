"""JSON records that people wrote: every field is checked, and an error says where it stands and what is wrong."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline.common.errors import PipelineError

T = TypeVar("T")
Position = TypeVar("Position", int, str)

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
def prefix_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except RecordError as error:
        raise PipelineError(f"{path}: {error}") from None


def map_records(
    records: Iterable[tuple[Position, object]], place: str, make: Callable[[Position, object], T]
) -> Iterator[tuple[Position, T]]:
    """Each position with what `make` makes of its record; errors say the position, as `place` puts it."""
    for position, record in records:
        try:
            value = make(position, record)
        except RecordError as error:
            raise RecordError(f"{place.format(position)}: {error}") from None
        yield position, value


def parse_json(
    text: str,
    line: int = 1,
    hook: Callable[[dict[str, Any]], object] | None = None,
    pairs_hook: Callable[[list[tuple[str, Any]]], object] | None = None,
) -> object:
    """The JSON value of `text`, which begins on that line of its file; a hook makes something else of each object."""
    try:
        value: object = json.loads(text, object_hook=hook, object_pairs_hook=pairs_hook)
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


def list_of(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise RecordError(f"not a list but {_kind(value)}")
    return value


def field(record: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = record.get(name)
    if type(value) is not kind:  # not isinstance: JSON's true is no whole number
        raise RecordError(f"{name!r} is {_kind(value)}, not {_KINDS[kind]}" if name in record else f"no field {name!r}")
    if kind is str and not str(value).isascii():
        check_encodable(name, str(value))
    return value


def check_encodable(name: str, text: str) -> None:
    """JSON may escape half of a surrogate pair, which no tokenizer and no file name takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{name!r} holds half of a surrogate pair") from None


def optional_text(record: Mapping[str, object], name: str) -> str | None:
    return None if record.get(name) is None else field(record, name, str)


def question_id_of(record: Mapping[str, object]) -> int | str:
    if isinstance(record.get("question_id"), str):
        return field(record, "question_id", str)
    return field(record, "question_id", int)


def answers_of(record: Mapping[str, object], *names: str) -> tuple[str, ...]:
    """The first of these fields that is there and not null: an answer, or a list of them; none if there is none."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return ()
    value = record[name]
    return texts_of(value, name) if isinstance(value, list) else (answer_text(value, name),)


def optional_texts(record: Mapping[str, object], name: str) -> tuple[str, ...]:
    return texts_of(field(record, name, list), name) if name in record else ()


def texts_of(values: list[Any], name: str = "answers") -> tuple[str, ...]:
    return tuple([answer_text(value, f"{name}[{position}]") for position, value in enumerate(values)])


def answer_text(value: object, name: str = "answer") -> str:
    """An answer as people would write it: a whole number in digits."""
    if type(value) is str:
        if not value.isascii():
            check_encodable(name, value)
        return value
    if type(value) is int:
        return str(value)
    hint = '; write "yes" or "no"' if type(value) is bool else ""
    if type(value) is float:
        hint = f'; write it as a text: "{value}"'
    raise RecordError(f"{name!r} is {_kind(value)}, not a text{hint}")


def answer_of(record: object, name: str = "answer") -> str:
    """The answer of a record that must have one."""
    known = object_of(record)
    if name not in known:
        raise RecordError(f"no field {name!r}")
    return answer_text(known[name], name)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)

"""Read fields of JSON records with type checks; errors name the position, the field and the problem."""

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
    str: "text",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    type(None): "null",
}


class RecordError(PipelineError):
    """A problem of a record. `map_records` adds its position, `prefix_errors` the file."""


@contextmanager
def prefix_errors(path: Path | str) -> Iterator[None]:
    """Turn a `RecordError` into a `PipelineError` that begins with the file."""
    try:
        yield
    except RecordError as error:
        raise PipelineError(f"{path}: {error}") from None


def map_records(
    records: Iterable[tuple[Position, object]], place: str, make: Callable[[Position, object], T]
) -> Iterator[tuple[Position, T]]:
    """Yield each position with `make(position, record)`; errors begin with the position, formatted by `place`."""
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
    """Parse `text`, which begins on line `line` of its file; the hooks are those of `json.loads`."""
    try:
        value: object = json.loads(text, object_hook=hook, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise RecordError(f"not JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; nested too deeply
        raise RecordError(f"cannot be read as JSON, from line {line}: {error}") from None
    return value


def object_of(value: object) -> Mapping[str, object]:
    """Return an object; raise `RecordError` for another type."""
    if not isinstance(value, dict):
        raise RecordError(f"expected an object, found {_kind(value)}")
    return value


def list_of(value: object) -> list[Any]:
    """Return a list; raise `RecordError` for another type."""
    if not isinstance(value, list):
        raise RecordError(f"expected a list, found {_kind(value)}")
    return value


def field(record: Mapping[str, object], name: str, kind: type[T]) -> T:
    """Return a required field; raise `RecordError` if it is missing or has another type."""
    value = record.get(name)
    if type(value) is not kind:  # not isinstance: true is not an integer
        raise RecordError(f"{name!r} is {_kind(value)}, not {_KINDS[kind]}" if name in record else f"no field {name!r}")
    if kind is str and not str(value).isascii():
        check_encodable(name, str(value))
    return value


def check_encodable(name: str, text: str) -> None:
    """Raise `RecordError` for half of a surrogate pair, which JSON can escape, but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{name!r} contains half of a surrogate pair") from None


def optional_text(record: Mapping[str, object], name: str) -> str | None:
    """Return a text field, None if it is missing or null."""
    return None if record.get(name) is None else field(record, name, str)


def question_id_of(record: Mapping[str, object]) -> int | str:
    """Return the required field `question_id`, an integer or a text."""
    if isinstance(record.get("question_id"), str):
        return field(record, "question_id", str)
    return field(record, "question_id", int)


def answers_of(record: Mapping[str, object], *names: str) -> tuple[str, ...]:
    """Return the answers in the first of these fields that is not null, a text or a list; none if all are null."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return ()
    value = record[name]
    return texts_of(value, name) if isinstance(value, list) else (answer_text(value, name),)


def optional_texts(record: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Return a list field of answers, empty if it is missing."""
    return texts_of(field(record, name, list), name) if name in record else ()


def texts_of(values: list[Any], name: str = "answers") -> tuple[str, ...]:
    """Return a list of answers as texts."""
    return tuple([answer_text(value, f"{name}[{position}]") for position, value in enumerate(values)])


def answer_text(value: object, name: str = "answer") -> str:
    """Return an answer as a text; an integer becomes its digits."""
    if type(value) is str:
        if not value.isascii():
            check_encodable(name, value)
        return value
    if type(value) is int:
        return str(value)
    hint = '; write "yes" or "no"' if type(value) is bool else ""
    if type(value) is float:
        hint = f'; write it as text: "{value}"'
    raise RecordError(f"{name!r} is {_kind(value)}, not text{hint}")


def answer_of(record: object, name: str = "answer") -> str:
    """Return the required answer of a record."""
    known = object_of(record)
    if name not in known:
        raise RecordError(f"no field {name!r}")
    return answer_text(known[name], name)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)

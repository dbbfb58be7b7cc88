"""Formats exceptions of libraries in one line each."""

from collections.abc import Iterator

from pydantic import ValidationError


def explain(error: ValidationError) -> Iterator[str]:
    """Yield a line for each invalid key: its value and what is allowed."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = ".".join(part for part in map(str, detail["loc"]) if part.isidentifier() and part not in _PYDANTIC_TYPES)
        message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
        value = f"{key} is {_short(detail['input'])}: " if key else ""
        found[key] = f"{found[key]}, or {message}" if key in found else f"{value}{message}"
    yield from found.values()


_PYDANTIC_TYPES = {"int", "float", "bool", "str", "tuple", "none"}
"""Parts that pydantic appends to the key of a value that may have several types."""


def one_line(error: Exception) -> str:
    """Return the message of an exception in one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

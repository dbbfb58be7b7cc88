"""Errors of libraries in a line each, for an error of ours."""

from collections.abc import Iterator

from pydantic import ValidationError


def explain(error: ValidationError) -> Iterator[str]:
    """Each key that is wrong, its value, and what is allowed."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        key = ".".join(part for part in map(str, one["loc"]) if part.isidentifier() and part not in _OF_PYDANTIC)
        message = f"{one['msg'][0].lower()}{one['msg'][1:]}"
        value = f"{key} is {_short(one['input'])}: " if key else ""
        found[key] = f"{found[key]}, or {message}" if key in found else f"{value}{message}"
    yield from found.values()


_OF_PYDANTIC = {"int", "float", "bool", "str", "tuple", "none"}
"""What it puts behind the key of a value that may be of several types."""


def one_line(error: Exception) -> str:
    """Its message, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

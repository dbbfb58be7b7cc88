"""Overrides of config values, KEY=VALUE on the command line, and errors that name the key and where it is set."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.common.errors import ConfigError
from pipeline.common.yaml_text import parse_yaml

Schema = type[BaseModel]


def apply_override(values: dict[str, Any], override: str, schema: Schema) -> None:
    """Set one key of a nested config.

    Args:
        values: the config, changed in place.
        override: `section.key=value`. The value is YAML; for a key that takes text, it may be any text.
        schema: model of the whole config.

    Raises:
        ConfigError: the override has another form, or its value is not YAML.
    """
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise ConfigError(f"{override!r} is not an override: write KEY.SUB=VALUE, as in train.epochs=1")
    value = _parse_value(override, text, _types_of(names, schema))
    for name in names[:-1]:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {name} is a value, not a section")
    values[names[-1]] = value


def combinations_of(overrides: Sequence[str], schema: Schema) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Expand overrides with several values, as `lora.r=8,16`, to all their combinations.

    Returns:
        combinations: key to value, one dict per combination; one empty dict if no override has several values.
        fixed: the overrides with a single value.

    Raises:
        ConfigError: a key with several values is given twice, or one of its values is.
    """
    listed = {override.partition("=")[0]: _split_values(override, schema) for override in overrides}
    _check_duplicates(overrides, schema)
    varied = {key: values for key, values in listed.items() if len(values) > 1}
    fixed = tuple(override for override in overrides if override.partition("=")[0] not in varied)
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())], fixed


def explain_errors(error: ValidationError, source: str, overrides: Sequence[str], schema: Schema) -> str:
    """Return one line per invalid key: the file or override that sets it, the problem, and the value found.

    For an unknown key, the line names the nearest known one.
    """
    return "\n".join(f"{_source_of(key, source, overrides)}: {problem}" for key, problem in _problems(error, schema))


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _parse_value(override: str, text: str, types: Sequence[Any]) -> Any:
    """Parse the value of an override as YAML. A key that takes text gets it unchanged, unless YAML reads a string."""
    takes_text = str in types or Path in types
    try:
        value = parse_yaml(text, repr(override))
    except (yaml.YAMLError, ValueError, RecursionError):
        if not takes_text:
            raise ConfigError(f"{override!r}: the value is not YAML; quote it") from None
        return text
    is_accepted = isinstance(value, str) or (value is None and type(None) in types)
    return value if is_accepted or not takes_text else text


def _split_values(override: str, schema: Schema) -> list[str]:
    """Split `key=a,b,c` at commas outside brackets. Text is not split."""
    key, _, text = override.partition("=")
    types = _types_of(key.split("."), schema)
    if str in types or Path in types:
        return [text]
    return [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", text)]


def _check_duplicates(overrides: Sequence[str], schema: Schema) -> None:
    """Check that keys with several values are given once. Of other keys, the last override is used."""
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        key, values = override.partition("=")[0], _split_values(override, schema)
        if len(values) > 1 and keys.count(key) > 1:
            raise ConfigError(f"{override!r}: {key} is given twice; list all its values in one override")
        if len(set(values)) < len(values):
            raise ConfigError(f"{override!r}: {key} lists a value twice")


def _source_of(key: str, source: str, overrides: Sequence[str]) -> str:
    """Return the override that sets `key`, or else `source`."""
    for override in reversed(overrides):
        if f"{key}.".startswith(f"{override.partition('=')[0]}."):
            return repr(override)
    return source


def _problems(error: ValidationError, schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield each invalid key with its problem."""
    invalid: dict[tuple[str, str], list[str]] = {}  # a union reports one problem per member
    for problem in error.errors(include_url=False):
        names = [str(name) for name in problem["loc"] if not re.match(r"constrained-|literal\[", str(name))]
        key = ".".join(names)
        if problem["type"] == "extra_forbidden":
            yield key, f"unknown key {key}; {_advice(names, schema)}"
        elif problem["type"] == "missing":
            yield key, f"{key} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "tuple_type":
                message = f"write a list: [{problem['input']}]"
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            invalid.setdefault((key, found), []).append(f"{message[0].lower()}{message[1:]}")
    for (key, found), messages in invalid.items():
        yield key, f"{key}: {', or '.join(messages)}{found}" if key else f"{', or '.join(messages)}{found}"


def _advice(names: Sequence[str], schema: Schema) -> str:
    """Name the nearest key of the section, else a key of that name in another section, else all keys of the section."""
    section = _section_of(names[:-1], schema)
    known = list(section.model_fields) if section else []
    nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
    elsewhere = [f"{name}.{names[-1]}" for name in schema.model_fields if _types_of([name, names[-1]], schema)]
    if nearest or elsewhere:
        return f"did you mean {' or '.join(nearest or elsewhere)}?"
    return f"known keys: {', '.join(known)}"


def _types_of(names: Sequence[str], schema: Schema) -> tuple[Any, ...]:
    """Return the types that a key accepts; none if it is unknown."""
    section = _section_of(names[:-1], schema)
    field = section.model_fields.get(names[-1]) if section else None
    return union_members(field.annotation) if field else ()


def _section_of(names: Sequence[str], schema: Schema) -> Schema | None:
    """Return the model of a section; None if there is no such section."""
    section = schema
    for name in names:
        field = section.model_fields.get(name)
        members = union_members(field.annotation) if field else ()
        inner = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        if not inner:
            return None
        section = inner[0]
    return section

"""What a command says at its end, in one style: a small table on stdout, an error on stderr."""

import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

COLOUR = False if os.environ.get("NO_COLOR") else None
"""None is by whether it is a terminal."""


def show_every_character() -> None:
    """Have stdout and stderr escape what their encoding lacks, as that of LC_ALL=C does; stdin takes any bytes."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def locale_problem(name: str) -> str | None:
    """Why this locale can name no such file, and what to set; None if it can, or none could."""
    encoding = sys.getfilesystemencoding()
    try:
        name.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        if encoding.replace("-", "") == "utf8":
            return None
        return (
            f"{name!a}: the encoding of this locale, {encoding}, has no such characters; set one that has: "
            "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    return None


def from_home(path: str | Path) -> Path:
    """The path that a user has typed: ~ at its beginning is a home folder, if it is one."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def show(summary: dict[str, Any]) -> None:
    """The summary as a table, on stdout."""
    click.echo(painted(table(summary)), color=COLOUR)


def print_error(what: str) -> None:
    """An error, on stderr."""
    click.echo(f"{click.style('pipe:', fg='red', bold=True)} {what}", err=True, color=COLOUR)


def painted(lines: str) -> str:
    """For a terminal: names in colour, headings bold."""
    found_lines = (re.fullmatch(r"( *\S.*?)(  +\S.*)", line) for line in lines.splitlines())
    pairs = zip(lines.splitlines(), found_lines, strict=True)
    return "\n".join(
        click.style(found[1], fg="cyan") + found[2] if found else click.style(line, bold=True) for line, found in pairs
    )


def table(summary: dict[str, Any], section: str = "") -> str:
    """A line each, those of a section indented; what is empty is 0 in a list and no section."""
    lines = []
    for key, value in summary.items():
        name = ("  " if section else "") + _name(key)
        if isinstance(value, dict):
            lines += [name, table(value, key)] if value else []
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += _columns(value)
        elif key.endswith("_interval") and value:
            lines.append(_line(name, " to ".join(_number(key, one) for one in value)))
        elif isinstance(value, list):
            lines += [_line(name if number == 0 else "", one) for number, one in enumerate(value or [0])]
        elif value is not None:
            lines.append(_line(name, _number(key, value, section)))
    return "\n".join(lines)


def _line(name: str, value: Any) -> str:
    return f"{name:<26}  {value}"


def _name(key: str) -> str:
    """A key in words; a reason in a user's or a file's words stays as it is."""
    return key.replace("_", " ") if key.isidentifier() else key


def _columns(records: list[dict[str, Any]]) -> list[str]:
    """A line each under a line of names, in columns."""
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[_name(name) for name in names]]
    rows += [[_number(name, record[name]) if name in record else "" for name in names] for record in records]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(key: str, value: Any, section: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    words = key.split("_")
    if "bytes" in [*words, *section.split("_")]:
        return f"{value / 2**20:,.1f} MiB"
    if "seconds" in words or section == "time":
        return f"{value:,.1f} s"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"
    return str(value)

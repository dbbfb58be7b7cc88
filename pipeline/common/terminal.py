"""Terminal input and output: encodings, paths, and the printed summary."""

import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

COLOR = False if os.environ.get("NO_COLOR") else None
"""None colors the output if it is a terminal."""


def escape_unencodable_characters() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, and make stdin accept any bytes."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def locale_problem(name: str) -> str | None:
    """Return an error message if the encoding of the locale cannot represent this file name, else None."""
    encoding = sys.getfilesystemencoding()
    try:
        name.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        if encoding.replace("-", "") == "utf8":
            return None
        return (
            f"{name!a}: the encoding of this locale, {encoding}, cannot represent this name. Set a UTF-8 locale: "
            "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    return None


def expand_home(path: str | Path) -> Path:
    """Replace a leading ~ by the home directory, if there is one."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary as a table on stdout."""
    click.echo(colorize(format_table(summary)), color=COLOR)


def print_error(message: str) -> None:
    """Print an error on stderr."""
    click.echo(f"{click.style('pipe:', fg='red', bold=True)} {message}", err=True, color=COLOR)


def warning_label() -> str:
    """Return the prefix of a warning, colored if stderr is a terminal."""
    colored = COLOR is None and sys.stderr.isatty()
    return f"{click.style('warning:', fg='yellow', bold=True) if colored else 'warning:'} "


def colorize(table: str) -> str:
    """Color the names in a formatted table, and make its headings bold."""
    lines = []
    for line in table.splitlines():
        found = re.fullmatch(r"( *\S.*?)(  +\S.*)", line)
        lines.append(click.style(found[1], fg="cyan") + found[2] if found else click.style(line, bold=True))
    return "\n".join(lines)


def format_table(summary: dict[str, Any], section: str = "") -> str:
    """Format a summary as one line per key.

    Sections are indented, and empty ones skipped. An empty list is printed as 0, and None is skipped.
    """
    lines = []
    for key, value in summary.items():
        name = ("  " if section else "") + _label(key)
        if isinstance(value, dict):
            lines += [name, format_table(value, key)] if value else []
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            lines += _columns(value)
        elif key.endswith("_interval") and value:
            lines.append(_line(name, " to ".join(_format_value(key, bound) for bound in value)))
        elif isinstance(value, list | tuple):
            lines += [_line(name if number == 0 else "", item) for number, item in enumerate(value or [0])]
        elif value is not None:
            lines.append(_line(name, _format_value(key, value, section)))
    return "\n".join(lines)


def _line(name: str, value: Any) -> str:
    return f"{name:<26}  {value}"


def _label(key: str) -> str:
    """Return a key with spaces; text that is no identifier, such as a reason, is unchanged."""
    return key.replace("_", " ") if key.isidentifier() else key


def _columns(records: list[dict[str, Any]] | tuple[dict[str, Any], ...]) -> list[str]:
    """Format records as aligned columns below a line of names."""
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[_label(name) for name in names]]
    rows += [
        [_format_value(name, record[name]) if record.get(name) is not None else "" for name in names]
        for record in records
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _format_value(key: str, value: Any, section: str = "") -> str:
    """Format a value with the unit that its key or section names."""
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

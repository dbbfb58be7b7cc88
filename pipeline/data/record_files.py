"""Read the records of a custom dataset from JSON lines, a JSON list, or a table as spreadsheets export it."""

import ast
import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from pipeline.data.records import RecordError, list_of, parse_json

REQUIRED_COLUMNS = ("image", "question")
TABLES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t", "|")


class Header(NamedTuple):
    """Header of a table: column names in lower case, delimiter, and line number."""

    names: list[str]
    delimiter: str
    line: int


def read_record_file(path: Path, text: str) -> tuple[str, Iterator[tuple[int, object]]]:
    """Return the format of positions in messages, and an iterator over positions and records. Raises `RecordError`."""
    beginning = text.lstrip()[:1]
    if beginning == "[" and not _is_lines(text):
        return "[{}]", enumerate(list_of(parse_json(text)))
    header = find_header(text) if beginning not in ("[", "{") else None
    if header and set(REQUIRED_COLUMNS) <= set(header.names):
        return "line {}", _table(text, header)
    if path.suffix.lower() in TABLES:
        found = f"its columns are {', '.join(header.names)}" if header else "it has no header line"
        raise RecordError(f"no columns {' and '.join(REQUIRED_COLUMNS)}; {found}")
    # str.splitlines also splits at U+2028 and similar characters, which JSON allows inside a text.
    lines = enumerate(text.split("\n"), start=1)
    return "line {}", ((number, parse_json(line, number)) for number, line in lines if line.strip())


def _is_lines(text: str) -> bool:
    """Return whether a text that begins with a list has a complete JSON value in its first line, and more lines."""
    first, _, rest = text.strip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def find_header(text: str) -> Header | None:
    """Return the header of a table, with the delimiter that yields the required columns, or else the most columns."""
    first, _, rest = text.partition("\n")
    line = 1
    if first.lower().startswith("sep="):  # written by Excel
        first, line = rest.partition("\n")[0], 2
    found = [Header(names, delimiter, line) for delimiter in _DELIMITERS if (names := _names(first, delimiter))]
    best = max(found, key=lambda header: (set(REQUIRED_COLUMNS) <= set(header.names), len(header.names)), default=None)
    return best if best and len(best.names) > 1 else None


def _names(line: str, delimiter: str) -> list[str]:
    try:
        cells = next(csv.reader([line.rstrip("\r")], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []
    return [cell.strip().lower() for cell in cells]


def _table(text: str, header: Header) -> Iterator[tuple[int, object]]:
    """Yield the first line and the non-empty cells by column of each non-empty row."""
    names = header.names
    if duplicates := [name for name in names if name and names.count(name) > 1]:
        raise RecordError(f"line {header.line}: the column {duplicates[0]!r} occurs several times")
    body = StringIO(text, newline="")
    for _ in range(header.line):
        body.readline()
    rows = csv.reader(body, delimiter=header.delimiter, strict=True)
    while True:
        line = header.line + rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise RecordError(f"line {line}: not a valid table row: {error}. Is a quote unclosed?") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            if len(cells) != len(names):
                raise RecordError(
                    f"line {line}: {len(cells)} cells, but the header has {len(names)}; quote texts that contain "
                    f"{header.delimiter!r}"
                )
            yield line, _record(dict(zip(names, cells, strict=True)), line)


def _record(cells: dict[str, str], line: int) -> dict[str, object]:
    record: dict[str, object] = {name: cell for name, cell in cells.items() if name in REQUIRED_COLUMNS or cell.strip()}
    if "question_id" in record:
        record["question_id"] = _number_or_text(cells["question_id"].strip())
    if cells.get("answers", "").lstrip().startswith("["):
        record["answers"] = _list(cells["answers"], line)
    return record


def _number_or_text(cell: str) -> int | str:
    """Return an integer if the text is its usual form, so that ids equal those of the same data in JSON."""
    return int(cell) if cell.isascii() and cell.isdecimal() and (cell == "0" or cell[0] != "0") else cell


def _list(cell: str, line: int) -> object:
    """Parse a list in JSON or Python syntax."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise RecordError(f"line {line}: column 'answers' begins like a list but cannot be parsed: {cell[:80]}")

"""Records of one's own in whatever file they lie: JSON lines, one JSON list, or a table as spreadsheets write it."""

import ast
import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from pipeline.data.records import RecordError, list_of, parse_json

NEEDED = ("image", "question")
TABLES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t", "|")


class Header(NamedTuple):
    """Of a table: its columns in lower case, what stands between them, and the number of its line."""

    names: list[str]
    delimiter: str
    line: int


def read_record_file(path: Path, text: str) -> tuple[str, Iterator[tuple[int, object]]]:
    """How a position is put in messages, and every record with its position. Raises RecordError."""
    beginning = text.lstrip()[:1]
    if beginning == "[" and not _is_lines(text):
        return "[{}]", enumerate(list_of(parse_json(text)))
    header = find_header(text) if beginning not in ("[", "{") else None
    if header and set(NEEDED) <= set(header.names):
        return "line {}", _table(text, header)
    if path.suffix.lower() in TABLES:
        found = f"its columns are {', '.join(header.names)}" if header else "it has no line of column names"
        raise RecordError(f"no columns {' and '.join(NEEDED)}; {found}")
    # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside a text.
    lines = enumerate(text.split("\n"), start=1)
    return "line {}", ((number, parse_json(line, number)) for number, line in lines if line.strip())


def _is_lines(text: str) -> bool:
    """Whether what begins like a list is one in the first line, and other lines follow."""
    first, _, rest = text.strip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def find_header(text: str) -> Header | None:
    """The header of a table: of the delimiters the one that finds the needed columns, or else the most."""
    first, _, rest = text.partition("\n")
    line = 1
    if first.lower().startswith("sep="):  # Excel's own
        first, line = rest.partition("\n")[0], 2
    found = [Header(names, delimiter, line) for delimiter in _DELIMITERS if (names := _names(first, delimiter))]
    most = max(found, key=lambda header: (set(NEEDED) <= set(header.names), len(header.names)), default=None)
    return most if most and len(most.names) > 1 else None


def _names(line: str, delimiter: str) -> list[str]:
    try:
        cells = next(csv.reader([line.rstrip("\r")], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []
    return [cell.strip().lower() for cell in cells]


def _table(text: str, header: Header) -> Iterator[tuple[int, object]]:
    """Each row that is not empty: its first line, and its cells by column, without the empty ones."""
    names = header.names
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise RecordError(f"line {header.line}: the column {twice[0]!r} is there twice")
    body = StringIO(text, newline="")
    for _ in range(header.line):
        body.readline()
    rows = csv.reader(body, delimiter=header.delimiter, strict=True)
    while True:
        line = header.line + rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise RecordError(f"line {line}: no row of a table: {error}. Is a quote not closed?") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            if len(cells) != len(names):
                raise RecordError(
                    f"line {line}: {len(cells)} cells, the header has {len(names)}; a text with {header.delimiter!r} "
                    "in it must stand in quotes"
                )
            yield line, _record(dict(zip(names, cells, strict=True)), line)


def _record(cells: dict[str, str], line: int) -> dict[str, object]:
    record: dict[str, object] = {name: cell for name, cell in cells.items() if name in NEEDED or cell.strip()}
    if "question_id" in record:
        record["question_id"] = _number_or_text(cells["question_id"].strip())
    if cells.get("answers", "").lstrip().startswith("["):
        record["answers"] = _list(cells["answers"], line)
    return record


def _number_or_text(cell: str) -> int | str:
    """A whole number where the text is one's usual form, so that ids are those of the same data in JSON."""
    return int(cell) if cell.isascii() and cell.isdecimal() and (cell == "0" or cell[0] != "0") else cell


def _list(cell: str, line: int) -> object:
    """A list as JSON or Python writes it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise RecordError(f"line {line}: column 'answers' begins like a list and is none: {cell[:80]}")

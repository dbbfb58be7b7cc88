"""Read and write a run's JSON lines files, one object per training step."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.common.files import append_line, write_text
from pipeline.common.progress import log_warning


def read_jsonl(path: Path, max_step: int = sys.maxsize) -> list[dict[str, Any]]:
    """Return the rows of the file at `path` up to and including `max_step`; none if there is no file.

    A killed run may have logged steps after its last checkpoint, and its last line may be incomplete. Damaged lines
    are skipped with a warning, an incomplete last line silently.
    """
    *lines, last_line = path.read_bytes().split(b"\n") if path.exists() else [b""]
    parsed = [_parse_row(line) for line in lines]
    damaged = sum(row is None for row in parsed)
    if damaged:
        log_warning(f"{path}: {damaged} damaged lines are skipped")
    return [row for row in [*parsed, _parse_row(last_line)] if row and row["step"] <= max_step]


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row.

    Raises:
        WriteError: the file cannot be written; then it is unchanged.
    """
    append_line(path, json.dumps(row))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the file at `path` with `rows`.

    Raises:
        WriteError: the file cannot be written; then it is unchanged.
    """
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in `line`; None if it is not a JSON object with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None

"""The name of a table of the `datasets` library, as a config gives it."""

from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class TableName:
    """Where a table is found, in the words of the config."""

    dataset: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def is_local(dataset: str) -> bool:
    """Whether it is files, there or not, and no hub id."""
    path = Path(dataset)
    looks = path.suffix in SUFFIXES or dataset.startswith(("/", "./", "../", "~")) or dataset.count("/") > 1
    return looks or bool(set(dataset) & set("*?[")) or path.exists()

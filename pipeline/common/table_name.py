"""Name of a table of the `datasets` library in a config."""

from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class TableName:
    """Location of a table, by the keys of the config."""

    dataset: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def is_local(dataset: str) -> bool:
    """Return whether the name refers to local files, existing or not, rather than to a hub id."""
    path = Path(dataset)
    is_path = path.suffix in SUFFIXES or dataset.startswith(("/", "./", "../", "~")) or dataset.count("/") > 1
    return is_path or bool(set(dataset) & set("*?[")) or path.exists()

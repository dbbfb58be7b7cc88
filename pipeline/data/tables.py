"""Tables with pictures in them, on the Hugging Face hub or on this disk: text row by row, pictures one at a time.

The `datasets` library fetches them and keeps them as Arrow files, which are mapped into memory and never loaded whole.
It is imported when a table is opened. No code of a data set is ever run.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from cache.files import sha256_of
from pipeline.common.errors import PipelineError
from pipeline.common.fingerprint_cache import file_states, recall, remember
from pipeline.common.progress import log_info, progress_bar
from pipeline.common.table_name import SUFFIXES, TableName, is_local
from pipeline.data.records import RecordError

CHUNK_SIZE = 10_000  # rows that are Python objects at the same time
_BYTES = {"binary", "large_binary", "binary_view"}
_PATHS = {"string", "large_string", "string_view"}


@dataclass(frozen=True, order=True, slots=True)
class TableImage:
    """A picture in a row of a table."""

    table: str
    row: int
    cells: "Cells" = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.table}: row {self.row}"

    def stored(self) -> bytes | Path | None:
        """Its bytes, or the file that the table names instead, if either is there. Raises OSError, ValueError."""
        return self.cells.stored(self.row)


ImageSource = Path | TableImage


class Cells:
    """A table's column of pictures, which every process that reads it maps into its own memory."""

    def __init__(self, rows: Any, column: str, folder: Path | None) -> None:
        self.rows, self.column, self.folder = rows, column, folder

    def stored(self, row: int) -> bytes | Path | None:
        value = self.all[row].as_py()
        cell = value if isinstance(value, dict) else {"path" if isinstance(value, str) else "bytes": value}
        data, path = cell.get("bytes"), cell.get("path")
        if data is not None or not path:
            return data
        leads_out = Path(path).anchor or ".." in Path(path).parts
        return self.folder / path if self.folder and not leads_out else None

    @cached_property
    def all(self) -> Any:
        return self.rows.select_columns([self.column])[:][self.column]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "all"}


class Table:
    """An open table; `name` begins every message about it."""

    def __init__(self, name: str, rows: Any, folder: Path | None) -> None:
        """`rows`: a `datasets.Dataset`; `folder`: where the files are that it may name instead of holding pictures."""
        self.name, self.folder = name, folder
        self._rows = rows.with_format("arrow")  # as stored: nothing is decoded

    @property
    def columns(self) -> list[str]:
        return list(self._rows.column_names)

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of these columns that is there."""
        return next((name for name in names if name in self.columns), None)

    def require(self, *names: str, hint: str = "") -> str:
        """The first of these columns that is there; RecordError without."""
        found = self.first_of(names)
        if found is None:
            raise RecordError(f"no column {' or '.join(names)}{hint}; its columns are {', '.join(self.columns)}")
        return found

    def records(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row's number, from 0, and its cells in these columns; of the others nothing is read."""
        some = self._rows.select_columns(sorted(columns))
        for column in columns:
            _validate(column, some[:][column])
        with progress_bar(f"rows of {self.name}", len(some), "rows", delay=2) as bar:
            for start in range(0, len(some), CHUNK_SIZE):
                rows = some[start : start + CHUNK_SIZE].to_pylist()
                yield from enumerate(rows, start)
                bar.update(len(rows))

    def pictures(self, column: str, images: Path | None) -> Cells:
        """The pictures of a column; those that are files are looked for in `images`, by default beside the table."""
        cells = Cells(self._rows, column, images or self.folder)
        kind = cells.all.type
        if not _holds_pictures(kind):
            raise RecordError(f"column {column!r} holds {kind}, no pictures: bytes, or a struct of bytes and path")
        _validate(column, cells.all)
        return cells


def _holds_pictures(kind: Any) -> bool:
    """Whether an Arrow type is the Image feature's, bytes, or paths."""
    if not str(kind).startswith("struct<"):
        return str(kind) in _BYTES | _PATHS
    fields = {one.name: str(one.type) for one in kind}
    is_known = fields.get("bytes", "null") in _BYTES | {"null"} and fields.get("path", "null") in _PATHS | {"null"}
    return is_known and bool({"bytes", "path"} & set(fields))


def _validate(column: str, cells: Any) -> None:
    """Raises RecordError for Arrow data that would be read beyond its end, or text that is not UTF-8."""
    try:
        cells.validate(full=True)
    except ValueError as error:
        raise RecordError(f"column {column!r} is damaged: {one_line(error)}") from None


def local_files(dataset: str) -> list[Path]:
    """The files of a table on this disk, none if they are not there."""
    path = Path(dataset)
    if path.is_dir():
        found = [file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}")]
        return sorted(file for file in found if not file.name.startswith("cache-"))  # what `datasets` leaves there
    if path.is_file():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def table_fingerprint(table: TableName) -> str | None:
    """SHA-256 (hex) of what a table is: of local files their bytes, of a hub id its name and revision.

    None if the files are not on this machine. Opens no table, and asks no hub.
    """
    what: list[str | None] = [table.dataset]
    if is_local(table.dataset):
        files = local_files(table.dataset)
        if not files:
            return None
        what = [_digest_of(files)]
    return hashlib.sha256(json.dumps([*what, table.subset, table.split, table.revision]).encode()).hexdigest()


def _digest_of(files: Sequence[Path]) -> str:
    state = file_states(files)
    if known := recall(state):
        return known
    with ThreadPoolExecutor() as pool:
        digests = "".join(pool.map(sha256_of, files))
    return remember(state, hashlib.sha256(digests.encode()).hexdigest())


def open_table(table: TableName, key: str, split: str) -> Table:
    """The table under `key` of the config; `split` is the config's, for tables that have several.

    Raises `PipelineError`: no `datasets` library, no such table, subset or split, or files that cannot be read.
    """
    datasets = _library()
    try:
        splits = _splits(datasets, table)
        chosen = _choose(list(splits), table, split)
        rows = splits[chosen]()
        if table.split and "[" in table.split:
            (part,) = datasets.ReadInstruction.from_spec(table.split).to_absolute({_base(table.split): len(rows)})
            rows = rows.select(range(part.from_, part.to))
    except Exception as error:  # the library's own, its file formats', the network's
        raise PipelineError(f"{table.dataset} ({key}): {_reason(error, table)}") from error
    revision = f"@{table.revision}" if table.revision else ""
    name = " ".join(filter(None, [table.dataset + revision, table.subset, table.split or chosen]))
    path = Path(table.dataset)
    return Table(name, rows, (path if path.is_dir() else path.parent) if is_local(table.dataset) else None)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise PipelineError('data.format hf needs the datasets library: pip install "datasets>=4"') from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs comes back as the error that it raises next
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _splits(datasets: Any, table: TableName) -> dict[str, Callable[[], Any]]:
    """What opens each split, of a hub id without fetching the others; the split of plain files is ""."""
    path = Path(table.dataset)
    if not is_local(table.dataset):
        builder = datasets.load_dataset_builder(table.dataset, table.subset, revision=table.revision)
        if builder.config.data_files is None:  # offline, and the library has it from an earlier time
            return {name: partial(builder.as_dataset, split=name) for name in builder.info.splits}
        return _of_files(datasets, table, builder.name, builder.config.data_files)
    files = local_files(table.dataset)
    suffixes = {file.suffix for file in files}
    if not files or not suffixes <= set(SUFFIXES):
        what = "format hf reads files that end" if files else "not there, or nothing in it ends"
        raise PipelineError(f"{what} in {' or '.join(SUFFIXES)}")
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        return {name: partial(datasets.load_from_disk, str(path / name)) for name in names}
    if (path / "state.json").is_file():
        return {"": partial(datasets.load_from_disk, str(path))}
    if path.is_dir():
        builder = datasets.load_dataset_builder(str(path), table.subset)
        return _of_files(datasets, table, builder.name, builder.config.data_files, _digest_of(files))
    if len(suffixes) > 1:
        raise PipelineError(f"files of one form, please, not {' and '.join(sorted(suffixes))}")
    if suffixes == {".arrow"} and all(_is_stream(file) for file in files):  # those need no copy
        return {"": lambda: datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])}
    return {"": _of_files(datasets, table, suffixes.pop()[1:], {"train": files}, _digest_of(files))["train"]}


def _of_files(
    datasets: Any, table: TableName, kind: str, files: Mapping[Any, Sequence[Any]], digest: str | None = None
) -> dict[str, Callable[[], Any]]:
    """What makes Arrow files of the files of each split, once; of local ones for each `digest`, not for each time."""
    name = digest and digest[:32]

    def load(split: str) -> Any:
        log_info(f"{table.dataset}: its rows are kept, once, as Arrow files in {datasets.config.HF_DATASETS_CACHE}")
        data_files = {split: list(map(str, files[split]))}
        return datasets.load_dataset(kind, name=name, data_files=data_files, split=split, keep_in_memory=False)

    return {str(split): partial(load, split) for split in files}


def _is_stream(file: Path) -> bool:
    """Whether an Arrow file is as `datasets` writes it; the other form begins with its name."""
    with file.open("rb") as opened:
        return opened.read(6) != b"ARROW1"


def _base(split: str) -> str:
    return split.partition("[")[0]


def _choose(names: list[str], table: TableName, split: str) -> str:
    wanted = [_base(table.split)] if table.split else [split, *(["validation"] if split == "val" else [])]
    if (not table.split and is_local(table.dataset) and len(names) == 1) or names == [""]:
        return names[0]
    for name in wanted:
        if name in names:
            return name
    raise PipelineError(f"no split {wanted[0]!r}; name one of {', '.join(names)} in dataset_split")


def _reason(error: BaseException, table: TableName) -> str:
    if isinstance(error, PipelineError):
        return str(error)
    reason, here = one_line(error), is_local(table.dataset)
    if isinstance(error, ConnectionError) and not here:
        return (
            f"{reason}. Without a network, name its files in the config instead: where there is one, "
            f"`hf download {table.dataset} --repo-type dataset` fetches them and tells where they lie"
        )
    if isinstance(error, FileNotFoundError) and not here:
        return f"{reason} Check name and revision; a private or gated data set needs `hf auth login`"
    return reason


def one_line(error: BaseException) -> str:
    """The first paragraph that says something; the library's say little and have a cause."""
    paragraphs = [" ".join(part.split()) for part in str(error).split("\n\n")]
    telling = [part for part in paragraphs if part and not part.startswith("An error occurred while generating")]
    if not telling and error.__cause__:
        return one_line(error.__cause__)
    return shorten(telling[0] if telling else type(error).__name__, 300)

"""Open tables with images, from the Hugging Face hub or from disk.

The `datasets` library downloads them and stores them as Arrow files, which are mapped into memory and never loaded
whole. It is imported when a table is opened. No code of a dataset is ever executed.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from cache.files import sha256_of
from pipeline.common.errors import PipelineError
from pipeline.common.fingerprint_cache import file_states, recall, remember
from pipeline.common.progress import log_info, progress_bar
from pipeline.common.table_name import SUFFIXES, TableName, is_local
from pipeline.data.image_sources import ImageColumn
from pipeline.data.records import RecordError

CHUNK_SIZE = 10_000
"""Rows converted to Python objects at a time."""
_BYTES = {"binary", "large_binary", "binary_view"}
_PATHS = {"string", "large_string", "string_view"}


class Table:
    """An open table. Messages about it begin with `name`."""

    def __init__(self, name: str, rows: Any, folder: Path | None, in_memory: bool = False) -> None:
        """Wrap a `datasets.Dataset`.

        Args:
            name: name in messages.
            rows: the dataset.
            folder: folder of the image files that rows may name.
            in_memory: the dataset was passed from Python.
        """
        self.name, self.folder, self.in_memory = name, folder, in_memory
        self._rows = rows.with_format("arrow")  # as stored: nothing is decoded

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._rows.column_names)

    def first_of(self, names: Sequence[str]) -> str | None:
        """Return the first of these columns that exists."""
        return next((name for name in names if name in self.columns), None)

    def require(self, *names: str, hint: str = "") -> str:
        """Return the first of these columns that exists. Raises `RecordError` if none does."""
        found = self.first_of(names)
        if found is None:
            raise RecordError(f"no column {' or '.join(names)}{hint}; its columns are {', '.join(self.columns)}")
        return found

    def records(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's number, from 0, and its cells in these columns; other columns are not read."""
        rows = self._rows.select_columns(sorted(columns))
        for column in columns:
            _validate(column, rows[:][column])
        with progress_bar(f"rows of {self.name}", len(rows), "rows", delay=2) as bar:
            for start in range(0, len(rows), CHUNK_SIZE):
                chunk = rows[start : start + CHUNK_SIZE].to_pylist()
                yield from enumerate(chunk, start)
                bar.update(len(chunk))

    def images(self, column: str, folder: Path | None) -> ImageColumn:
        """Return the images of a column. Files that it names are in `folder`, by default next to the table."""
        images = ImageColumn(self._rows, column, folder or self.folder, self.in_memory)
        kind = images.read(slice(0, 1)).type if self.in_memory else images.all.type
        if not _is_image_type(kind):
            raise RecordError(f"column {column!r} has type {kind}, not images: bytes, or a struct of bytes and path")
        if not self.in_memory:
            _validate(column, images.all)
        return images


def _is_image_type(kind: Any) -> bool:
    """Return whether an Arrow type is that of the Image feature, bytes, or paths."""
    if not str(kind).startswith("struct<"):
        return str(kind) in _BYTES | _PATHS
    fields = {one.name: str(one.type) for one in kind}
    is_known = fields.get("bytes", "null") in _BYTES | {"null"} and fields.get("path", "null") in _PATHS | {"null"}
    return is_known and bool({"bytes", "path"} & set(fields))


def _validate(column: str, cells: Any) -> None:
    """Raise `RecordError` if Arrow data would be read beyond its end, or text is not UTF-8."""
    try:
        cells.validate(full=True)
    except ValueError as error:
        raise RecordError(f"column {column!r} is damaged: {one_line(error)}") from None


def local_files(dataset: str) -> list[Path]:
    """Return the files of a table on this disk; none if they do not exist."""
    path = Path(dataset)
    if path.is_dir():
        found = [file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}")]
        return sorted(file for file in found if not file.name.startswith("cache-"))  # written there by `datasets`
    if path.is_file():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def table_fingerprint(table: TableName) -> str | None:
    """Return a SHA-256 (hex) that identifies a table: of local files their bytes, of a hub id its name and revision.

    None if the files are not on this machine. This opens no table and needs no network.
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
    """Open the table of the config's `key`.

    Args:
        table: its name.
        key: the config key, for messages.
        split: the config's split, which selects one if the table has several.

    Raises:
        PipelineError: no `datasets` library, no such table, subset or split, or unreadable files.
    """
    datasets = _library()
    try:
        splits = _splits(datasets, table)
        chosen = _choose(list(splits), table, split)
        rows = splits[chosen]()
        if table.split and "[" in table.split:
            (part,) = datasets.ReadInstruction.from_spec(table.split).to_absolute({_base(table.split): len(rows)})
            rows = rows.select(range(part.from_, part.to))
    except Exception as error:  # of the library, its file formats, or the network
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
    datasets.logging.set_verbosity(logging.CRITICAL)  # its logs are repeated in the error that it raises next
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _splits(datasets: Any, table: TableName) -> dict[str, Callable[[], Any]]:
    """Return a function that opens each split, without downloading the others. Plain files have the split ""."""
    path = Path(table.dataset)
    if not is_local(table.dataset):
        builder = datasets.load_dataset_builder(table.dataset, table.subset, revision=table.revision)
        if builder.config.data_files is None:  # offline, with a copy that the library has prepared before
            return {name: partial(builder.as_dataset, split=name) for name in builder.info.splits}
        return _of_files(datasets, table, builder.name, builder.config.data_files)
    files = local_files(table.dataset)
    suffixes = {file.suffix for file in files}
    if not files or not suffixes <= set(SUFFIXES):
        what = "format hf reads only files" if files else "not found, or contains no files"
        raise PipelineError(f"{what} with the suffix {' or '.join(SUFFIXES)}")
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        return {name: partial(datasets.load_from_disk, str(path / name)) for name in names}
    if (path / "state.json").is_file():
        return {"": partial(datasets.load_from_disk, str(path))}
    if path.is_dir():
        builder = datasets.load_dataset_builder(str(path), table.subset)
        return _of_files(datasets, table, builder.name, builder.config.data_files, _digest_of(files))
    if len(suffixes) > 1:
        raise PipelineError(f"the files have different suffixes: {' and '.join(sorted(suffixes))}; use one")
    if suffixes == {".arrow"} and all(_is_stream(file) for file in files):  # mapped as they are, without a copy
        return {"": lambda: datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])}
    return {"": _of_files(datasets, table, suffixes.pop()[1:], {"train": files}, _digest_of(files))["train"]}


def _of_files(
    datasets: Any, table: TableName, kind: str, files: Mapping[Any, Sequence[Any]], digest: str | None = None
) -> dict[str, Callable[[], Any]]:
    """Return a function per split that converts its files to Arrow files, once; local ones once per `digest`."""
    name = digest and digest[:32]

    def load(split: str) -> Any:
        log_info(f"{table.dataset}: converting once to Arrow files in {datasets.config.HF_DATASETS_CACHE}")
        data_files = {split: list(map(str, files[split]))}
        return datasets.load_dataset(kind, name=name, data_files=data_files, split=split, keep_in_memory=False)

    return {str(split): partial(load, split) for split in files}


def _is_stream(file: Path) -> bool:
    """Return whether an Arrow file has the streaming format, as `datasets` writes it."""
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
    raise PipelineError(f"no split {wanted[0]!r}; set dataset_split to one of {', '.join(names)}")


def _reason(error: BaseException, table: TableName) -> str:
    if isinstance(error, PipelineError):
        return str(error)
    reason, here = one_line(error), is_local(table.dataset)
    if isinstance(error, ConnectionError) and not here:
        return (
            f"{reason}. Without a network, set the config key to local files: `hf download {table.dataset} "
            "--repo-type dataset`, run with a network, downloads them and prints their folder"
        )
    if isinstance(error, FileNotFoundError) and not here:
        return f"{reason} Check name and revision; a private or gated data set needs `hf auth login`"
    return reason


def one_line(error: BaseException) -> str:
    """Return the first informative paragraph of an error of the library, or of its cause."""
    paragraphs = [" ".join(part.split()) for part in str(error).split("\n\n")]
    informative = [part for part in paragraphs if part and not part.startswith("An error occurred while generating")]
    if not informative and error.__cause__:
        return one_line(error.__cause__)
    return shorten(informative[0] if informative else type(error).__name__, 300)

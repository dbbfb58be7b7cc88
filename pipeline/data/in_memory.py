"""Read datasets that are passed from Python: lists of records, or tables of the `datasets` library."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.common.errors import PipelineError
from pipeline.config import SPLITS, SplitFiles
from pipeline.data.examples import SkippedItem, Split, VQAExample
from pipeline.data.formats.hf import read_table
from pipeline.data.formats.jsonl import example_of
from pipeline.data.image_sources import ImageSource, MemoryImage
from pipeline.data.records import RecordError, prefix_errors
from pipeline.data.sources import Sources, collect
from pipeline.data.tables import Table

Records = Sequence[Mapping[str, Any]]
"""Records with the fields of the jsonl format; `image` is a path or a `PIL.Image.Image`."""
InMemoryData = Mapping[str, Any]
"""Split -> `Records`, or a `datasets.Dataset` with the columns of the hf format."""

FINGERPRINT_KEY = "records"
"""Key of the fingerprint of an in-memory split among the manifest's `sources`."""
_ALIASES = {"validation": "val"}


def normalize_data(data: InMemoryData | None) -> dict[str, Any]:
    """Return the data by the names of the config's splits. Raises `PipelineError` for unknown names or types."""
    splits = {}
    if data is not None and not isinstance(data, Mapping):
        raise PipelineError(f"data is a {type(data).__name__}; pass a mapping, such as {{'train': records}}")
    for name, records in (data or {}).items():
        split = _ALIASES.get(name, name)
        if split not in SPLITS:
            raise PipelineError(f"data has no split {name!r}; allowed: {', '.join(SPLITS)}")
        if not (_is_dataset(records) or _is_list(records)):
            raise PipelineError(f"{_name(split)} is a {type(records).__name__}; {_advice(records)}")
        splits[split] = records
    return splits


def read_in_memory(split: str, records: Any, files: SplitFiles | None) -> tuple[Split, dict[str, str]]:
    """Read a split that is passed from Python.

    Args:
        split: its name.
        records: `Records` or a `datasets.Dataset`.
        files: the config's files of that split. Relative image paths are relative to their `images` folder, or to the
            current folder.

    Returns:
        The split, and its fingerprint as an entry of the manifest's `sources`.

    Raises:
        PipelineError: a malformed record, named by its index, or no valid question.
    """
    sources = Sources(split, images=files.images.absolute() if files and files.images else None)
    if _is_dataset(records):
        found = read_table(sources, Table(_name(split), records, None, in_memory=True))
    else:
        with prefix_errors(_name(split)):
            found = _read_records(sources, records)
    if not found.examples:
        reason = f": {len(found.skipped)} skipped, the last one: {found.skipped[-1].reason}" if found.skipped else ""
        raise PipelineError(f"{_name(split)} contains no valid questions{reason}")
    return found, {FINGERPRINT_KEY: _fingerprint(found.examples)}


def is_in_memory(sources: Mapping[str, Mapping[str, str]], split: str) -> bool:
    """Return whether the manifest's `sources` name a split that was passed from Python."""
    return FINGERPRINT_KEY in sources.get(split, {})


def _read_records(sources: Sources, records: Records) -> Split:
    folder = (sources.images or Path()).absolute()
    name, invalid = _name(sources.split), []

    def valid_records() -> Iterator[tuple[int, object]]:
        for index, record in enumerate(records):
            where = f"{name}: record {index}"
            try:
                yield index, (record, _image_of(record, folder, where))
            except RecordError as error:
                raise RecordError(f"record {index}: {error}") from None
            except _UndecodableImageError as error:
                invalid.append(SkippedItem(sources.split, str(error), where))

    def example(index: int, value: Any) -> VQAExample:
        record, image = value
        answers = {key: list(record[key]) for key in ("answers", "answer") if isinstance(record.get(key), tuple)}
        return example_of({**record, **answers}, index, image)

    found = collect(sources, name, "record {}", valid_records(), example)
    return found._replace(skipped=invalid + found.skipped)


class _UndecodableImageError(Exception):
    """An image passed from Python that Pillow cannot decode."""


def _image_of(record: object, folder: Path, where: str) -> ImageSource:
    if not isinstance(record, Mapping):
        raise RecordError(f"expected a mapping with image, question and answer, found {type(record).__name__}")
    if "image" not in record:
        raise RecordError("no field 'image'")
    image = record["image"]
    if isinstance(image, str | Path) and str(image):
        return folder / image
    if isinstance(image, Image.Image):
        try:
            return MemoryImage.of(image, where)
        except Exception as error:  # Pillow raises anything for a damaged file: OSError, SyntaxError, struct.error, ...
            raise _UndecodableImageError(f"cannot be decoded: {' '.join(str(error).split())}") from None
    hint = "; convert an array with PIL.Image.fromarray" if hasattr(image, "__array__") else ""
    raise RecordError(f"'image' is {type(image).__name__}, not a path or a PIL image{hint}")


def _fingerprint(examples: Sequence[VQAExample]) -> str:
    """Return the SHA-256 (hex) of the records."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.to_record()).encode())
    return digest.hexdigest()


def _is_dataset(records: object) -> bool:
    """Return whether this is a `datasets.Dataset`, without importing the library."""
    methods = ("column_names", "with_format", "select_columns", "__getitem__")
    return not isinstance(records, Mapping) and all(hasattr(records, name) for name in methods)


def _is_list(records: object) -> bool:
    return isinstance(records, Sequence) and not isinstance(records, str | bytes)


def _name(split: str) -> str:
    return f"data['{split}']"


def _advice(records: object) -> str:
    if hasattr(records, "to_dict") and hasattr(records, "columns"):
        return "pass a list of records: df.to_dict('records')"
    if isinstance(records, Mapping) and hasattr(records, "column_names"):
        return f"pass one of its splits: {', '.join(map(str, records))}"
    return "pass a list of records or a datasets.Dataset"

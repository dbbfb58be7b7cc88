"""Locations of the files of a split, and the conversion of their records to a `Split`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.table_name import TableName
from pipeline.data.examples import DUPLICATE_ID, NO_ANSWER, SkippedItem, Split, VQAExample
from pipeline.data.records import Position, RecordError, list_of, map_records, parse_json, prefix_errors

OnRead = Callable[[Path, bytes], object]


@dataclass(frozen=True, slots=True)
class Sources:
    """Locations of the files of one split: `data.{split}` of the config."""

    split: str
    annotations: Path | None = None
    images: Path | None = None
    questions: Path | None = None
    on_read: OnRead = lambda path, data: None
    """Called with the bytes of each annotation file as they are parsed."""
    tables: Mapping[str, TableName] = field(default_factory=dict)
    """By config key: `dataset`, `image_dataset`."""

    @property
    def may_lack_answers(self) -> bool:
        """Whether questions without answers are valid: on test splits."""
        return self.split.startswith("test")

    def skip_reason(self, question_id: int | str) -> str | None:
        """Return why a question without answers is skipped, None if it is valid."""
        return None if self.may_lack_answers else NO_ANSWER

    def require(self, key: str) -> Path:
        """Return a path; raise `PipelineError` if the config does not set it."""
        path: Path | None = getattr(self, key)
        if path is None:
            raise self._not_set(key)
        return path

    def require_table(self, key: str) -> TableName:
        """Return the name of a table; raise `PipelineError` if the config does not set it."""
        if key not in self.tables:
            raise self._not_set(key)
        return self.tables[key]

    def _not_set(self, key: str) -> PipelineError:
        return PipelineError(f"data.{self.split}.{key} is not set, but this data.format requires it")

    def read_text(self, path: Path) -> str:
        """Return the text of an annotation file; raise `RecordError` if it is unreadable or not UTF-8."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror}") from None
        self.on_read(path, data)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 at byte {error.start}; save it as UTF-8 (Excel: CSV UTF-8)") from None


def collect(
    sources: Sources,
    path: Path | str,
    place: str,
    records: Iterable[tuple[Position, object]],
    make: Callable[[Position, object], VQAExample],
    skip_reason: Callable[[int | str], str | None] | None = None,
) -> Split:
    """Convert records to a split.

    Args:
        sources: the split's files.
        path: the file, for messages.
        place: format of a position in messages, such as "line {}".
        records: the records with their positions.
        make: creates the example of a record.
        skip_reason: replaces `Sources.skip_reason`.
    """
    examples: dict[int | str, VQAExample] = {}
    skipped: list[SkippedItem] = []
    file = str(path)
    skip_reason = skip_reason or sources.skip_reason
    for position, example in map_records(records, place, make):
        key = example.question_id
        if key in examples:
            reason: str | None = DUPLICATE_ID
        else:
            reason = None if example.answers else skip_reason(key)
        if reason is None:
            examples[key] = example
            object.__setattr__(example, "where", f"{file}: {place.format(position)}")  # frozen, but not shared yet
        else:
            skipped.append(
                SkippedItem(sources.split, reason, f"{file}: {place.format(position)}", key, str(example.image))
            )
    return Split(list(examples.values()), skipped)


def collect_list(sources: Sources, make: Callable[[int, object], VQAExample]) -> Split:
    """Convert an annotations file that is one JSON list of records."""
    path = sources.require("annotations")
    with prefix_errors(path):
        records = list_of(parse_json(sources.read_text(path)))
        return collect(sources, path, "[{}]", enumerate(records), make)


def image_resolver(folder: Path) -> Callable[[str], Path]:
    """Return a function from an image name to its path in `folder`; it raises `RecordError` for names outside it."""

    @cache
    def path(name: str) -> Path:
        relative = Path(name)
        if relative.anchor:
            raise RecordError(f"image {name!r} must be relative to the images folder, {folder}")
        if ".." in relative.parts or not relative.parts or "\0" in name:
            raise RecordError(f"image {name!r} does not name a file inside {folder}")
        return folder / relative

    return path

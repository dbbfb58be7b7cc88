"""Tables of the `datasets` library, on the Hugging Face hub or on this disk, with the pictures inside."""

import ast
from collections.abc import Callable, Iterator
from sys import intern
from typing import Any

from pipeline.data.examples import DIFFICULT, SkippedItem, Split, VQAExample, is_blank
from pipeline.data.records import RecordError, answer_text, field, prefix_errors, question_id_of, texts_of
from pipeline.data.sources import Sources, collect
from pipeline.data.tables import Table, TableImage, open_table

_ANSWERS = ("answers", "direct_answers", "answer", "multiple_choice_answer")  # the first that is not blank counts
_IDS = ("question_id", "questionId", "id")
_IMAGE_IDS = ("imageId", "image_id")
_TYPES = ("answer_type", "question_type")
_DIFFICULT = "difficult_direct_answer"  # A-OKVQA's

_Record = dict[str, Any]


def read(sources: Sources) -> Split:
    """A table with the columns `question`, `image` (bytes, or a struct of bytes and path) and one of `_ANSWERS`.

    Answers are a text, or a list of texts or of records with `answer`. Optional: an id, one of `_IDS` (default: the
    row's number, from 0), `answer_type`, `question_type`. With an `image_dataset` the pictures are that table's
    `image`, found by its `id` and one of `_IMAGE_IDS`; questions whose picture it lacks are left out.
    """
    table = open_table(sources.require_table("dataset"), f"data.{sources.split}.dataset", sources.split)
    without: list[SkippedItem] = []
    with prefix_errors(table.name):
        question, key = table.require("question"), table.first_of(_IDS)
        answers = [column for column in _ANSWERS if column in table.columns]
        if not answers and not sources.may_lack_answers:
            table.require(*_ANSWERS)
        image_id, find_image = _image_finder(sources, table)

        def records() -> Iterator[tuple[int, tuple[TableImage, _Record]]]:
            optional = [column for column in (key, image_id, _DIFFICULT, *_TYPES) if column in table.columns]
            for row, record in table.records({question, *answers, *filter(None, optional)}):
                picture = find_image(row, record)
                if picture:
                    yield row, (picture, record)
                else:
                    reason = f"no picture in data.{sources.split}.image_dataset"
                    where, image = f"{table.name}: row {row}", str(record[image_id or ""])
                    without.append(SkippedItem(sources.split, reason, where, image=image))

        def example(row: int, value: Any) -> VQAExample:
            picture, record = value
            types = [record[name] if isinstance(record.get(name), str) else None for name in _TYPES]
            if record.get(_DIFFICULT) is True:
                types[0] = DIFFICULT
            return VQAExample(
                row if key is None else question_id_of({"question_id": record[key]}),
                picture,
                field(record, question, str),
                next(filter(_holds_answer, (_texts(name, record[name]) for name in answers)), ()),
                *types,
            )

        found = collect(sources, table.name, "row {}", records(), example)
    return found._replace(skipped=without + found.skipped)


def _image_finder(sources: Sources, table: Table) -> tuple[str | None, Callable[[int, _Record], TableImage | None]]:
    """What finds a row's picture; with a table of pictures also the column of their ids, and None for unknown ones."""
    if "image_dataset" not in sources.tables:
        column = table.require("image", hint=", and no image_dataset or image_subset in the config")
        cells = table.pictures(column, sources.images)
        return None, lambda row, record: TableImage(table.name, row, cells)
    images = open_table(sources.tables["image_dataset"], f"data.{sources.split}.image_dataset", sources.split)
    by_id: dict[str, TableImage] = {}
    with prefix_errors(images.name):
        cells, key = images.pictures(images.require("image"), sources.images), images.require("id")
        for row, record in images.records([key]):
            by_id.setdefault(str(record[key]), TableImage(images.name, row, cells))
    image_id = table.require(*_IMAGE_IDS)
    return image_id, lambda row, record: by_id.get(str(record[image_id]))


def _texts(column: str, value: object) -> tuple[str, ...]:
    """The texts of a cell: a text, texts, or records with `answer`; a record of lists is how old tables put those."""
    if column == "direct_answers" and isinstance(value, str):
        value = _listed(value)  # A-OKVQA's, as Python prints a list
    if isinstance(value, dict):
        value = value.get("answer")
    if value is None:
        return ()
    if not isinstance(value, list):
        return (answer_text(value, column),)
    texts = [item.get("answer") if isinstance(item, dict) else item for item in value]
    return tuple(map(intern, texts_of(texts, column)))  # answers repeat


def _holds_answer(texts: tuple[str, ...]) -> bool:
    return not all(map(is_blank, texts))


def _listed(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecordError(f"'direct_answers' is no list: {text[:80]}") from None

"""Read tables with images through the `datasets` library, from the Hugging Face hub or from disk."""

import ast
from collections.abc import Callable, Iterator
from sys import intern
from typing import Any

from pipeline.data.examples import DIFFICULT, SkippedItem, Split, VQAExample, is_blank
from pipeline.data.image_sources import TableImage
from pipeline.data.records import RecordError, answer_text, field, prefix_errors, question_id_of, texts_of
from pipeline.data.sources import Sources, collect
from pipeline.data.tables import Table, open_table

_ANSWERS = ("answers", "direct_answers", "answer", "multiple_choice_answer")  # the first non-blank one is used
_IDS = ("question_id", "questionId", "id")
_IMAGE_IDS = ("imageId", "image_id")
_TYPES = ("answer_type", "question_type")
_DIFFICULT = "difficult_direct_answer"  # A-OKVQA's

_NO_IMAGE_DATASET = ", and the config sets neither image_dataset nor image_subset"

_Record = dict[str, Any]


def read(sources: Sources) -> Split:
    """Read a table with the columns `question`, `image` (bytes, or a struct of bytes and path) and one of `_ANSWERS`.

    Answers are a text, or a list of texts or of records with `answer`. Optional: an id, one of `_IDS` (default: the
    row number, from 0), `answer_type`, `question_type`. With an `image_dataset` the images are those of that table's
    column `image`, found by its `id` and one of `_IMAGE_IDS`; questions whose image it lacks are skipped.
    """
    table = open_table(sources.require_table("dataset"), f"data.{sources.split}.dataset", sources.split)
    return read_table(sources, table)


def read_table(sources: Sources, table: Table) -> Split:
    """Read an open table."""
    without_image: list[SkippedItem] = []
    with prefix_errors(table.name):
        question, key = table.require("question"), table.first_of(_IDS)
        answers = [column for column in _ANSWERS if column in table.columns]
        if not answers and not sources.may_lack_answers:
            table.require(*_ANSWERS)
        image_id, find_image = _image_finder(sources, table)

        def records() -> Iterator[tuple[int, tuple[TableImage, _Record]]]:
            optional = [column for column in (key, image_id, _DIFFICULT, *_TYPES) if column in table.columns]
            for row, record in table.records({question, *answers, *filter(None, optional)}):
                image = find_image(row, record)
                if image:
                    yield row, (image, record)
                else:
                    reason = f"no image in data.{sources.split}.image_dataset"
                    where, name = f"{table.name}: row {row}", str(record[image_id or ""])
                    without_image.append(SkippedItem(sources.split, reason, where, image=name))

        def example(row: int, value: Any) -> VQAExample:
            image, record = value
            types = [record[name] if isinstance(record.get(name), str) else None for name in _TYPES]
            if record.get(_DIFFICULT) is True:
                types[0] = DIFFICULT
            return VQAExample(
                row if key is None else question_id_of({"question_id": record[key]}),
                image,
                field(record, question, str),
                next(filter(_has_answer, (_texts(name, record[name]) for name in answers)), ()),
                *types,
            )

        found = collect(sources, table.name, "row {}", records(), example)
    return found._replace(skipped=without_image + found.skipped)


def _image_finder(sources: Sources, table: Table) -> tuple[str | None, Callable[[int, _Record], TableImage | None]]:
    """Return the column of image ids, if there is an `image_dataset`, and a function that finds the image of a row."""
    if "image_dataset" not in sources.tables:
        column = table.require("image", hint=_NO_IMAGE_DATASET if sources.tables else "")
        images = table.images(column, sources.images)
        return None, lambda row, record: TableImage(table.name, row, images)
    image_table = open_table(sources.tables["image_dataset"], f"data.{sources.split}.image_dataset", sources.split)
    by_id: dict[str, TableImage] = {}
    with prefix_errors(image_table.name):
        images, key = image_table.images(image_table.require("image"), sources.images), image_table.require("id")
        for row, record in image_table.records([key]):
            by_id.setdefault(str(record[key]), TableImage(image_table.name, row, images))
    image_id = table.require(*_IMAGE_IDS)
    return image_id, lambda row, record: by_id.get(str(record[image_id]))


def _texts(column: str, value: object) -> tuple[str, ...]:
    """Return the texts of a cell: a text, a list of texts or of records with `answer`, or a record of lists."""
    if column == "direct_answers" and isinstance(value, str):
        value = _parse_list(value)  # in A-OKVQA, a list as Python prints it
    if isinstance(value, dict):
        value = value.get("answer")
    if value is None:
        return ()
    if not isinstance(value, list):
        return (answer_text(value, column),)
    texts = [item.get("answer") if isinstance(item, dict) else item for item in value]
    return tuple(map(intern, texts_of(texts, column)))  # answers repeat


def _has_answer(texts: tuple[str, ...]) -> bool:
    return not all(map(is_blank, texts))


def _parse_list(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecordError(f"'direct_answers' is not a list: {text[:80]}") from None

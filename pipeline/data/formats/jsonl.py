"""Read custom datasets: JSON lines, a JSON list, or a table (CSV, TSV)."""

from collections.abc import Mapping

from pipeline.data.examples import Split, VQAExample
from pipeline.data.image_sources import ImageSource
from pipeline.data.record_files import read_record_file
from pipeline.data.records import answers_of, field, object_of, optional_text, prefix_errors, question_id_of
from pipeline.data.sources import Sources, collect, image_resolver


def read(sources: Sources) -> Split:
    """Read records of `image, question, answers` or `answer`, a text or a list of texts.

    `image` is relative to the images folder. `answers` precedes `answer`. Integers are read as text. In a table the
    first line names the columns, and a cell of `answers` may be a JSON list.

    Optional: `question_id` (default: the line number, from 1, or the index in a list, from 0), `answer_type`,
    `question_type`. Blank lines and other fields are ignored.
    """
    path, resolve_image = sources.require("annotations"), image_resolver(sources.require("images"))

    def example(number: int, value: object) -> VQAExample:
        record = object_of(value)
        return example_of(record, number, resolve_image(field(record, "image", str)))

    with prefix_errors(path):
        place, records = read_record_file(path, sources.read_text(path))
        return collect(sources, path, place, records, example)


def example_of(record: Mapping[str, object], number: int, image: ImageSource) -> VQAExample:
    """Return the example of a record, all fields but `image`; `number` is the default of `question_id`."""
    return VQAExample(
        question_id=question_id_of(record) if "question_id" in record else number,
        image=image,
        question=field(record, "question", str),
        answers=answers_of(record, "answers", "answer"),
        answer_type=optional_text(record, "answer_type"),
        question_type=optional_text(record, "question_type"),
    )

"""The form for data of one's own: one JSON object a line, a JSON list of them, or a table (CSV, TSV)."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.record_files import read_record_file
from pipeline.data.records import answers_of, field, object_of, optional_text, prefix_errors, question_id_of
from pipeline.data.sources import Sources, collect, image_resolver


def read(sources: Sources) -> Split:
    """Records of `image, question, answers` or `answer`, a text or a list of texts: JSON lines, a list, or a table.

    `image` is relative to the images folder. If both are there, `answers` counts. Whole numbers are read as texts. In a
    table the first line names the columns, and a cell of `answers` may be a list in JSON.

    Optional: `question_id` (default: the line's number, from 1, or the place in a list, from 0), `answer_type`,
    `question_type`. Blank lines are skipped, other fields ignored.
    """
    path, resolve_image = sources.require("annotations"), image_resolver(sources.require("images"))

    def example(number: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=question_id_of(record) if "question_id" in record else number,
            image=resolve_image(field(record, "image", str)),
            question=field(record, "question", str),
            answers=answers_of(record, "answers", "answer"),
            answer_type=optional_text(record, "answer_type"),
            question_type=optional_text(record, "question_type"),
        )

    with prefix_errors(path):
        place, records = read_record_file(path, sources.read_text(path))
        return collect(sources, path, place, records, example)

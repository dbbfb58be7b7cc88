"""The form for data of one's own: one JSON object a line, a JSON list of them, or a table (CSV, TSV)."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import answers_of, field, naming, object_of, optional_text, question_id_of
from pipeline.data.rows import read_rows
from pipeline.data.sources import Sources, collect, pictures


def read(sources: Sources) -> Split:
    """Records of `image, question, answers` or `answer`, a text or a list of texts: JSON lines, a list, or a table.

    `image` is relative to the images folder. If both are there, `answers` counts. Whole numbers are read as texts. In a
    table the first line names the columns, and a cell of `answers` may be a list in JSON.

    Optional: `question_id` (default: the line's number, from 1, or the place in a list, from 0), `answer_type`,
    `question_type`. Blank lines are skipped, other fields ignored.
    """
    path, picture = sources.need("annotations"), pictures(sources.need("images"))

    def example(number: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=question_id_of(record) if "question_id" in record else number,
            image=picture(field(record, "image", str)),
            question=field(record, "question", str),
            answers=answers_of(record, "answers", "answer"),
            answer_type=optional_text(record, "answer_type"),
            question_type=optional_text(record, "question_type"),
        )

    with naming(path):
        place, records = read_rows(path, sources.read_text(path))
        return collect(sources, path, place, records, example)

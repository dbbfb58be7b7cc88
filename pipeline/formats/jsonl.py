"""One JSON object a line: the form for data of one's own."""

from pipeline.examples import Split, VQAExample
from pipeline.records import answers_of, field, naming, object_of, optional_text, parse_json, question_id_of
from pipeline.sources import Sources, collect, pictures


def read(sources: Sources) -> Split:
    """One JSON object a line: `image, question, answers` or `answer`, a text or a list of texts.

    `image` is relative to the images folder. If both are there, `answers` counts. Whole numbers are read as texts.
    Optional:
    `question_id` (default: the line's number, from 1), `answer_type`, `question_type`. Blank lines are
    skipped, other fields ignored.
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
        # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside a text.
        lines = enumerate(sources.read_text(path).split("\n"), start=1)
        records = ((number, parse_json(line, number)) for number, line in lines if line.strip())
        return collect(sources, path, "line {}", records, example)

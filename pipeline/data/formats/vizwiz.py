"""Read VizWiz-VQA."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import answer_of, field, object_of, optional_text
from pipeline.data.sources import Sources, collect_list, image_resolver


def read(sources: Sources) -> Split:
    """Read VizWiz, {split}.json: a list of `image, question, answers[]{answer}, answer_type?`, no answers on test.

    An image has one question, so the id of a question is the name of its image, `image`.
    """
    resolve_image = image_resolver(sources.require("images"))

    def example(_: int, value: object) -> VQAExample:
        record = object_of(value)
        name = field(record, "image", str)
        answers = field(record, "answers", list) if "answers" in record else []
        return VQAExample(
            question_id=name,
            image=resolve_image(name),
            question=field(record, "question", str),
            answers=tuple([answer_of(answer) for answer in answers]),
            answer_type=optional_text(record, "answer_type"),
        )

    return collect_list(sources, example)

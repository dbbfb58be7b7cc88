"""Read TextVQA."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import field, object_of, optional_texts, parse_json, prefix_errors
from pipeline.data.sources import Sources, collect, image_resolver


def read(sources: Sources) -> Split:
    """Read TextVQA, TextVQA_0.5.1_{split}.json.

    `data[]{question_id, image_id, question, answers[]}`, no answers on test. The image is `{image_id}.jpg`.
    """
    path, resolve_image = sources.require("annotations"), image_resolver(sources.require("images"))

    def example(_: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=field(record, "question_id", int),
            image=resolve_image(f"{field(record, 'image_id', str)}.jpg"),
            question=field(record, "question", str),
            answers=optional_texts(record, "answers"),
        )

    with prefix_errors(path):
        whole = object_of(parse_json(sources.read_text(path)))
        return collect(sources, path, "data[{}]", enumerate(field(whole, "data", list)), example)

"""TextVQA."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import field, naming, object_of, optional_texts, parse_json
from pipeline.data.sources import Sources, collect, pictures


def read(sources: Sources) -> Split:
    """TextVQA (TextVQA_0.5.1_{split}.json): `data[]{question_id, image_id, question, answers[]}`, no answers on test;
    the picture is `{image_id}.jpg`.
    """
    path, picture = sources.need("annotations"), pictures(sources.need("images"))

    def example(_: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=field(record, "question_id", int),
            image=picture(f"{field(record, 'image_id', str)}.jpg"),
            question=field(record, "question", str),
            answers=optional_texts(record, "answers"),
        )

    with naming(path):
        whole = object_of(parse_json(sources.read_text(path)))
        return collect(sources, path, "data[{}]", enumerate(field(whole, "data", list)), example)

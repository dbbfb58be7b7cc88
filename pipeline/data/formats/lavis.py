"""Read the format of LAVIS, in which it publishes VQAv2, OK-VQA and Visual Genome."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import answers_of, field, object_of, question_id_of
from pipeline.data.sources import Sources, collect_list, image_resolver


def read(sources: Sources) -> Split:
    """Read LAVIS, such as vqa_train.json: a list of `image, question, answer, question_id?`, no answer on test.

    `answer` is a text, or a list in which answers repeat. `image` is relative to the images folder. If there is an
    answer, `question_id` defaults to the position, from 0.
    """
    resolve_image = image_resolver(sources.require("images"))

    def example(position: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=position if "question_id" not in record and "answer" in record else question_id_of(record),
            image=resolve_image(field(record, "image", str)),
            question=field(record, "question", str),
            answers=answers_of(record, "answer"),
        )

    return collect_list(sources, example)

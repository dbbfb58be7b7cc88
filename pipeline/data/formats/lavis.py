"""LAVIS's own form, in which it offers VQAv2, OK-VQA and Visual Genome."""

from pipeline.data.examples import Split, VQAExample
from pipeline.data.records import answers_of, field, object_of, question_id_of
from pipeline.data.sources import Sources, collect_list, image_resolver


def read(sources: Sources) -> Split:
    """LAVIS (vqa_train.json and its like): a list of `image, question, answer, question_id?`, no answer on test.

    `answer` is a list, in which an answer stands as often as it was given, or one text; `image` is relative to the
    images folder. Where there is an answer, the default of `question_id` is the position, from 0.
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

"""Read A-OKVQA."""

from collections.abc import Sequence

from pipeline.data.examples import DIFFICULT, Split, VQAExample
from pipeline.data.records import field, object_of, optional_texts
from pipeline.data.sources import Sources, collect_list, image_resolver


def read(sources: Sources) -> Split:
    """Read A-OKVQA, aokvqa_v1p0_{split}.json.

    A list of `question_id, image_id, question, difficult_direct_answer, direct_answers[]`, the last not on test. The
    images are those of COCO 2017, `{image_id:012d}.jpg`. The direct answers are read, not the choices. Questions that
    are marked as difficult for direct answers have the answer type `DIFFICULT`.
    """
    resolve_image = image_resolver(sources.require("images"))

    def example(_: int, value: object) -> VQAExample:
        record = object_of(value)
        return VQAExample(
            question_id=field(record, "question_id", str),
            image=resolve_image(f"{field(record, 'image_id', int):012d}.jpg"),
            question=field(record, "question", str),
            answers=optional_texts(record, "direct_answers"),
            answer_type=DIFFICULT if field(record, "difficult_direct_answer", bool) else "direct answer",
        )

    return collect_list(sources, example)


def results(examples: Sequence[VQAExample], answers: Sequence[str]) -> object:
    """Return predictions in the form of the leaderboard, without the multiple choice."""
    pairs = zip(examples, answers, strict=True)
    return {example.question_id: {"direct_answer": answer} for example, answer in pairs}

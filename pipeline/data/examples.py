"""What every data set is read into: questions on images, and what had to be left out."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pipeline.common.errors import PipelineError
from pipeline.data.records import field, optional_text, question_id_of, texts_of
from pipeline.data.tables import ImageSource

DUPLICATE_ID = "duplicate question_id"  # the reasons of `SkippedItem`s; "no annotation in FILE" is one more
DUPLICATE_ANNOTATION = "duplicate annotation"
NO_ANSWER = "no answer"
NO_IMAGE = "caption of an unlisted image"

DIFFICULT = "difficult direct answer"  # the answer type of questions that A-OKVQA's direct-answer accuracy leaves out

BYTE_ORDER_MARK = "\ufeff"  # of a file, and no part of its text

_path = lru_cache(maxsize=1 << 17)(Path)  # an image has several questions, and a Path is slow to make


@dataclass(frozen=True, slots=True)
class VQAExample:
    """One question on one image; `answers` are all that people gave, and none on a test split.

    Answers that are all blank are none. Beside others a blank one stays, since published scripts count it among the
    ten that they compare with; it is never trained.
    """

    question_id: int | str
    image: ImageSource
    question: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None
    where: str | None = dataclasses.field(default=None, compare=False, repr=False)
    """File and position of the record, as in error messages: "train.jsonl: line 7"; None of one from a cache."""

    def __post_init__(self) -> None:
        if BYTE_ORDER_MARK in self.question:
            object.__setattr__(self, "question", self.question.replace(BYTE_ORDER_MARK, ""))
        said = "".join(self.answers)
        if BYTE_ORDER_MARK in said:
            without = tuple(answer.replace(BYTE_ORDER_MARK, "") for answer in self.answers)
            object.__setattr__(self, "answers", without)
        if is_blank(said):
            object.__setattr__(self, "answers", ())

    @property
    def trainable_answers(self) -> list[str]:
        """Those that are not blank."""
        return [answer for answer in self.answers if not is_blank(answer)]

    @property
    def target(self) -> str:
        """The most common answer, of equally common ones the first; PipelineError where there is none."""
        if not self.answers:
            raise PipelineError(f"question {self.question_id!r} has no answers: nothing to train towards")
        return Counter(self.trainable_answers).most_common(1)[0][0]

    def to_record(self) -> dict[str, object]:
        """The fields as JSON types, without those that are None."""
        record: dict[str, object] = {
            "question_id": self.question_id,
            "image": str(self.image),
            "question": self.question,
            "answers": list(self.answers),
        }
        if self.answer_type is not None:
            record["answer_type"] = self.answer_type
        if self.question_type is not None:
            record["question_type"] = self.question_type
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "VQAExample":
        """The inverse of `to_record`; PipelineError for a field that is missing or of the wrong type."""
        return cls(
            question_id=question_id_of(record),
            image=_path(field(record, "image", str)),
            question=field(record, "question", str),
            answers=texts_of(field(record, "answers", list)),
            answer_type=optional_text(record, "answer_type"),
            question_type=optional_text(record, "question_type"),
        )


@dataclass(frozen=True, slots=True)
class SkippedItem:
    """One question, or one picture, that training will not see."""

    split: str
    reason: str  # one of the above, or a picture's
    where: str  # file and position of the record, as in error messages: "train.jsonl: line 7"
    question_id: int | str | None = None
    image: str | None = None
    questions: int = 1
    """How many are lost by it: all those on a picture; none where an annotation alone is one too many."""


class Split(NamedTuple):
    """The questions of one split that can be used, in the file's order, and those that cannot."""

    examples: Sequence[VQAExample]
    skipped: list[SkippedItem]


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen: spaces of any kind, and characters of no width."""
    return not text[:1].isalnum() and all(
        character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text
    )

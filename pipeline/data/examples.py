"""Questions on images, the form that every dataset is read into, and the records that were skipped."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pipeline.common.errors import PipelineError
from pipeline.data.image_sources import ImageSource
from pipeline.data.records import field, optional_text, question_id_of, texts_of

DUPLICATE_ID = "duplicate question_id"
"""A reason of a `SkippedItem`, as are the following ones."""
DUPLICATE_ANNOTATION = "duplicate annotation"
NO_ANSWER = "no answer"
NO_IMAGE = "caption of an unlisted image"

DIFFICULT = "difficult direct answer"
"""Answer type of the questions that A-OKVQA's direct-answer accuracy ignores."""

BYTE_ORDER_MARK = "\ufeff"
"""Removed from all texts: it belongs to a file, not to its text."""

_path = lru_cache(maxsize=1 << 17)(Path)  # an image has several questions, and creating a Path is slow


@dataclass(frozen=True, slots=True)
class VQAExample:
    """One question on one image, with all answers of the annotators; a test split may have none.

    If all answers are blank, there are none. A blank answer among others is kept, since published scripts compare with
    it, but it is never a training target.
    """

    question_id: int | str
    image: ImageSource
    question: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None
    where: str | None = dataclasses.field(default=None, compare=False, repr=False)
    """File and position of the record, as in error messages: "train.jsonl: line 7". None if read from a cache."""

    def __post_init__(self) -> None:
        """Normalize the texts."""
        if BYTE_ORDER_MARK in self.question:
            object.__setattr__(self, "question", self.question.replace(BYTE_ORDER_MARK, ""))
        joined = "".join(self.answers)
        if BYTE_ORDER_MARK in joined:
            cleaned = tuple(answer.replace(BYTE_ORDER_MARK, "") for answer in self.answers)
            object.__setattr__(self, "answers", cleaned)
        if is_blank(joined):
            object.__setattr__(self, "answers", ())

    @property
    def trainable_answers(self) -> list[str]:
        """The answers that are not blank."""
        return [answer for answer in self.answers if not is_blank(answer)]

    @property
    def target(self) -> str:
        """The most common answer, the first of equally common ones. Raises `PipelineError` if there is none."""
        if not self.answers:
            raise PipelineError(f"question {self.question_id!r} has no answers to train on")
        return Counter(self.trainable_answers).most_common(1)[0][0]

    def to_record(self) -> dict[str, object]:
        """Return the fields as JSON types, without those that are None."""
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
        """Invert `to_record`. Raises `PipelineError` for a field that is missing or has the wrong type."""
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
    """A question, or all questions on an image, that will not be trained on."""

    split: str
    reason: str
    """One of the above, "no annotation in FILE", or why the image is invalid."""
    where: str
    """File and position of the record, as in error messages: "train.jsonl: line 7"."""
    question_id: int | str | None = None
    image: str | None = None
    questions: int = 1
    """Number of questions skipped: all on an image; 0 for a duplicate annotation."""


class Split(NamedTuple):
    """The valid questions of one split, in the file's order, and the skipped items."""

    examples: Sequence[VQAExample]
    skipped: list[SkippedItem]


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character: only white space and characters of no width."""
    return not text[:1].isalnum() and all(
        character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text
    )

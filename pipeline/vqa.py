"""Visual question answering data sets in their published formats -> `VQAExample`s.

One reader a format, listed in `FORMATS`. A reader checks the text that it reads: a malformed record is an
error that says where it stands, a well-formed one that training cannot use is left out and listed. Whether
the pictures are there is for the stage that opens them.
"""

import difflib
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import ConfigError, PipelineError

T = TypeVar("T")
OnRead = Callable[[Path, bytes], object]
TWICE = "question_id is there twice"  # the reasons of `LeftOut`s; "no annotation in FILE" is the fourth
ANNOTATED_TWICE = "question_id is annotated twice"
NO_ANSWER = "no answer"

_path = lru_cache(maxsize=1 << 17)(Path)  # an image has several questions, and a Path is slow to make


@dataclass(frozen=True, slots=True)
class VQAExample:
    """One question on one image; `answers` are all that people gave, and none on a test split."""

    question_id: int | str
    image: Path
    question: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None

    @property
    def target(self) -> str:
        """The most common answer, of equally common ones the first; PipelineError where there is none."""
        if not self.answers:
            raise PipelineError(f"question {self.question_id!r} has no answers: nothing to train towards")
        return Counter(self.answers).most_common(1)[0][0]

    def to_record(self) -> dict[str, object]:
        """The fields as JSON types, without those that are None."""
        record: dict[str, object] = {
            "question_id": self.question_id,
            "image": str(self.image),
            "question": self.question,
            "answers": list(self.answers),
            "answer_type": self.answer_type,
            "question_type": self.question_type,
        }
        return {name: value for name, value in record.items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "VQAExample":
        """The inverse of `to_record`; PipelineError for a field that is missing or of the wrong type."""
        return cls(
            question_id=_question_id(record),
            image=_path(_field(record, "image", str)),
            question=_field(record, "question", str),
            answers=_texts(_field(record, "answers", list)),
            answer_type=_optional_text(record, "answer_type"),
            question_type=_optional_text(record, "question_type"),
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
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

    examples: list[VQAExample]
    left_out: list[LeftOut]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where one split lies: `data.{split}` of the config."""

    split: str
    annotations: Path | None = None
    images: Path | None = None
    questions: Path | None = None
    on_read: OnRead = lambda path, data: None
    """Is told the bytes of each annotation file: those that are parsed, whatever becomes of the file later."""

    @property
    def may_lack_answers(self) -> bool:
        return self.split.startswith("test")

    def lacks(self, question_id: int | str) -> str | None:
        """Why a question without answers is left out, or None where it may lack them."""
        return None if self.may_lack_answers else NO_ANSWER

    def need(self, key: str) -> Path:
        path: Path | None = getattr(self, key)
        if path is None:
            raise PipelineError(f"data.{self.split}.{key} is not set, and this data.format needs it")
        return path

    def read_text(self, path: Path) -> str:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _RecordError(f"cannot be read: {error.strerror}") from None
        self.on_read(path, data)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _RecordError(f"not UTF-8 at byte {error.start}") from None


def read_examples(
    format: str,
    split: str,
    annotations: Path | None = None,
    images: Path | None = None,
    questions: Path | None = None,
    on_read: OnRead = lambda path, data: None,
) -> Split:
    """All questions of one split, in the file's order, and what is left out.

    Which files a format needs, and what stands in them, is told at its reader below. The paths are
    those of the config's `data.{split}`; `on_read` is told the bytes of each file. Left out are questions
    without an answer, except on splits whose name begins with "test", and of usable questions with the
    same id all but the first.

    Raises:
        ConfigError: an unknown format.
        PipelineError: an unknown split, a file that is not set, not there, not UTF-8 or not
            JSON, a malformed record (file and position are named), or no questions that can be used.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0)[0]
        raise ConfigError(f"no data.format {format!r}; nearest: {near}; allowed: {', '.join(FORMATS)}")
    with _without_garbage_collection():
        examples, left_out = FORMATS[format](Sources(split, annotations, images, questions, on_read))
    if not examples:
        message = f"data.{split}: no questions in {questions or annotations or format}"
        if left_out:
            message += f" that can be used: {len(left_out)} left out, the last at {left_out[-1].where}: "
            message += left_out[-1].reason
        raise PipelineError(message)
    return Split(examples, left_out)


def read_easy_vqa(sources: Sources) -> Split:
    """easy-VQA (PyPI, easy-vqa): the package carries text and pictures, so no path is needed.

    `data/{split}/questions.json` is [[question, answer, image id], ...]; the id is the position.
    """
    if sources.split not in ("train", "test"):
        raise PipelineError(f"easy_vqa has the splits train and test, not {sources.split!r}")
    package = find_spec("easy_vqa")
    if package is None or not package.submodule_search_locations:
        raise PipelineError("data.format easy_vqa needs the easy-vqa package: pip install easy-vqa")
    folder = Path(package.submodule_search_locations[0], "data", sources.split)
    picture = _pictures(folder / "images")

    def example(position: int, record: object) -> VQAExample:
        if not isinstance(record, list) or len(record) != 3:
            raise _RecordError("not a list of question, answer and image id")
        fields = dict(zip(("question", "answer", "image id"), record, strict=True))
        answer = _field(fields, "answer", str)
        answer_type = "yes/no" if answer in ("yes", "no") else "other"
        image = picture(f"{_field(fields, 'image id', int)}.png")
        return VQAExample(position, image, _field(fields, "question", str), (answer,), answer_type)

    path = folder / "questions.json"
    with _naming(path):
        records = _parse(sources.read_text(path))
        if not isinstance(records, list):
            raise _RecordError("not a list of questions")
        return _split(sources, path, "[{}]", enumerate(records), example)


def read_jsonl(sources: Sources) -> Split:
    """One JSON object a line: `image, question, answers` (a list) or `answer` (a text).

    `image` is relative to the images folder. If both are there, `answers` counts. Optional:
    `question_id` (default: the line's number, from 1), `answer_type`, `question_type`. Blank lines are
    skipped, other fields ignored.
    """
    path, picture = sources.need("annotations"), _pictures(sources.need("images"))

    def example(number: int, value: object) -> VQAExample:
        record = _object(value)
        return VQAExample(
            question_id=_question_id(record) if "question_id" in record else number,
            image=picture(_field(record, "image", str)),
            question=_field(record, "question", str),
            answers=_answers(record),
            answer_type=_optional_text(record, "answer_type"),
            question_type=_optional_text(record, "question_type"),
        )

    with _naming(path):
        # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside a text.
        lines = enumerate(sources.read_text(path).split("\n"), start=1)
        records = ((number, _parse(line, number)) for number, line in lines if line.strip())
        return _split(sources, path, "line {}", records, example)


def read_vqav2(sources: Sources) -> Split:
    """VQAv2 and OK-VQA: a questions file, an annotations file joined on `question_id`, COCO's images.

    Questions: `data_subtype, questions[]{question_id, image_id, question}`; the picture is
    `COCO_{data_subtype}_{image_id:012d}.jpg`. Annotations: `annotations[]{question_id, answers[]{answer},
    question_type?, answer_type?}`; a test split may have none. Annotations of other questions are ignored;
    where the file is given, questions that are not in it are left out, on test splits too.
    """
    path, picture = sources.need("questions"), _pictures(sources.need("images"))
    annotations, annotated_twice = _vqav2_annotations(sources)

    def lacks(question_id: int | str) -> str | None:
        if annotations is None or question_id in annotations:
            return sources.lacks(question_id)
        return f"no annotation in {sources.annotations}"

    with _naming(path):
        whole = _object(_parse(sources.read_text(path)))
        # test-dev is a part of test: its pictures are test's.
        prefix = f"COCO_{_field(whole, 'data_subtype', str).replace('test-dev', 'test')}"

        def example(_: int, value: object) -> VQAExample:
            record = _object(value)
            key = _question_id(record)
            answers, answer_type, question_type = (annotations or {}).get(key, _NOT_ANNOTATED)
            image = picture(f"{prefix}_{_field(record, 'image_id', int):012d}.jpg")
            return VQAExample(key, image, _field(record, "question", str), answers, answer_type, question_type)

        records = enumerate(_field(whole, "questions", list))
        examples, left_out = _split(sources, path, "questions[{}]", records, example, lacks)
    return Split(examples, annotated_twice + left_out)


FORMATS: dict[str, Callable[[Sources], Split]] = {
    "easy_vqa": read_easy_vqa,
    "jsonl": read_jsonl,
    "vqav2": read_vqav2,
}

_Annotation = tuple[tuple[str, ...], str | None, str | None]  # answers, answer type, question type
_NOT_ANNOTATED: _Annotation = ((), None, None)


def _vqav2_annotations(sources: Sources) -> tuple[dict[int | str, _Annotation] | None, list[LeftOut]]:
    """Annotations by question id, None on a test split without; and the repeated ones, of which the first counts."""
    if sources.annotations is None and sources.may_lack_answers:
        return None, []
    path = sources.need("annotations")
    annotations: dict[int | str, _Annotation] = {}
    twice: list[LeftOut] = []

    def annotation(_: int, value: object) -> tuple[int | str, _Annotation]:
        record = _object(value)
        answers = _vqav2_answers(_field(record, "answers", list))
        types = _optional_text(record, "answer_type"), _optional_text(record, "question_type")
        return _question_id(record), (answers, *types)

    with _naming(path):
        records = _field(_object(_parse(sources.read_text(path), hook=_answer_alone)), "annotations", list)
        for position, (key, made) in _each(enumerate(records), "annotations[{}]", annotation):
            if key not in annotations:
                annotations[key] = made
            else:
                where = f"{path}: annotations[{position}]"
                twice.append(LeftOut(sources.split, ANNOTATED_TWICE, where, key, questions=0))
    return annotations, twice


def _answer_alone(record: dict[str, Any]) -> object:
    """An answer record -> its answer, while the file is being parsed; any other record as it is.

    VQAv2's 4.4 million answer records take 1.3 GB, and some 200,000 answers are distinct.
    """
    answer = record.get("answer")
    return intern(answer) if type(answer) is str and "answers" not in record else record


def _vqav2_answers(answers: list[Any]) -> tuple[str, ...]:
    return tuple([item if type(item) is str else _field(_object(item), "answer", str) for item in answers])


class _RecordError(PipelineError):
    """What is wrong with a record; `_each` adds its position and `_naming` the file."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except _RecordError as error:
        raise PipelineError(f"{path}: {error}") from None


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects that are all kept: searching them for garbage takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _split(
    sources: Sources,
    path: Path,
    place: str,
    records: Iterable[tuple[int, object]],
    make: Callable[[int, object], VQAExample],
    lacks: Callable[[int | str], str | None] | None = None,
) -> Split:
    """The split that `make` makes of the file's (position, record)s; `lacks` replaces `Sources.lacks`."""
    examples: dict[int | str, VQAExample] = {}
    left_out: list[LeftOut] = []
    lacks = lacks or sources.lacks
    for position, example in _each(records, place, make):
        key = example.question_id
        if key in examples:
            reason: str | None = TWICE
        else:
            reason = None if example.answers else lacks(key)
        if reason is None:
            examples[key] = example
        else:
            where = f"{path}: {place.format(position)}"
            left_out.append(LeftOut(sources.split, reason, where, key, str(example.image)))
    return Split(list(examples.values()), left_out)


def _each(
    records: Iterable[tuple[int, object]], place: str, make: Callable[[int, object], T]
) -> Iterator[tuple[int, T]]:
    """Each position with what `make` makes of its record; errors say the position, as `place` puts it."""
    for position, record in records:
        try:
            value = make(position, record)
        except _RecordError as error:
            raise _RecordError(f"{place.format(position)}: {error}") from None
        yield position, value


def _parse(text: str, line: int = 1, hook: Callable[[dict[str, Any]], object] | None = None) -> object:
    """The JSON value of `text`, which begins on that line of its file; `hook` replaces each object."""
    try:
        value: object = json.loads(text, object_hook=hook)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise _RecordError(f"not JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise _RecordError(f"cannot be read as JSON, from line {line}: {error}") from None
    return value


def _pictures(folder: Path) -> Callable[[str], Path]:
    """Picture name -> its path in `folder`, made once a name; names that lead out of it are refused."""

    @cache
    def path(name: str) -> Path:
        relative = Path(name)
        if relative.anchor:
            raise _RecordError(f"image {name!r} must be relative to the images folder, {folder}")
        if ".." in relative.parts or not relative.parts or "\0" in name:
            raise _RecordError(f"image {name!r} does not name a file inside {folder}")
        return folder / relative

    return path


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _RecordError(f"not an object but {_kind(value)}")
    return value


def _field(record: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = record.get(name)
    if type(value) is not kind:  # not isinstance: JSON's true is no whole number
        raise _RecordError(
            f"{name!r} is {_kind(value)}, not {_KINDS[kind]}" if name in record else f"no field {name!r}"
        )
    if kind is str:
        _check_encodable(name, str(value))
    return value


def _check_encodable(name: str, text: str) -> None:
    """JSON may escape half of a surrogate pair, which no tokenizer and no file name takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _RecordError(f"{name!r} holds half of a surrogate pair") from None


def _optional_text(record: Mapping[str, object], name: str) -> str | None:
    return None if record.get(name) is None else _field(record, name, str)


def _question_id(record: Mapping[str, object]) -> int | str:
    value = record.get("question_id")
    return value if isinstance(value, str) else _field(record, "question_id", int)


def _answers(record: Mapping[str, object]) -> tuple[str, ...]:
    if "answers" in record:
        return _texts(_field(record, "answers", list))
    return (_field(record, "answer", str),) if "answer" in record else ()


def _texts(values: list[Any]) -> tuple[str, ...]:
    for position, value in enumerate(values):
        if type(value) is not str:
            raise _RecordError(f"'answers[{position}]' is {_kind(value)}, not a text")
    return tuple(values)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a fraction",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)

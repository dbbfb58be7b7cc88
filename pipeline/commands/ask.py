"""Ask questions about image files: a single one, in a terminal, or from the lines of a pipe."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from torch import Tensor

from pipeline.answers.predictor import Prediction, Predictor, clean_question
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.common.terminal import expand_home
from pipeline.encoding.images import ImageError
from pipeline.runs.run import RunLike

MAX_QUOTED = 200
"""Characters of a line quoted in an error message."""
HELP = "Enter a question, or the path of an image to change the image. An empty line or Ctrl-D exits."


def ask(
    run: RunLike,
    image: str | os.PathLike[str] | None = None,
    question: str | None = None,
    overrides: Sequence[str] = (),
    with_adapter: bool = True,
    as_json: bool = False,
    output: TextIO | None = None,
) -> Prediction | None:
    """Answer a question on an image; without one of the two, read images and questions from stdin.

    In a terminal the user is prompted for lines until an empty one. Otherwise every line of stdin gives one line of
    output. A line is a question on the current image, or the path of another image.

    Args:
        run: a `Run`, the path of a run folder, or the result of `train`.
        image: the path of the first image.
        question: a question.
        overrides: `key=value` overrides of the run's config.
        with_adapter: False for the model before training.
        as_json: write answers to `output` as JSON objects, one per line.
        output: receives the answers to lines of stdin, by default stdout.

    Returns:
        The prediction if `image` and `question` are given, None otherwise.

    Raises:
        PipelineError: the image or the question is invalid, or some lines of a pipe were not answered.
    """
    predictor = Predictor(run, overrides, with_adapter)
    if image is not None and question is not None:
        return predictor.predict(expand_home(os.fspath(image)), question)
    writer = AnswerWriter(output or sys.stdout, as_json)
    conversation = Conversation(predictor, writer.write)
    if sys.stdin.isatty():
        _prompt_for_lines(conversation, image)
    else:
        _answer_lines(conversation, image, writer)
    return None


class AnswerWriter:
    """Writes answers, one per line."""

    def __init__(self, output: TextIO, as_json: bool) -> None:
        """Write to `output`: JSON objects with `as_json`, otherwise plain answers."""
        self.output, self.as_json = output, as_json
        self.lines_written = 0

    def write(self, prediction: Prediction) -> None:
        """Write an answer, or all of the prediction as JSON."""
        self._write_line(prediction.to_dict())

    def write_unanswered(self, line: str, error: str) -> None:
        """Write an empty line, or a JSON object with the input line and the error, if there is one."""
        self._write_line({"line": line, "answer": None} | ({"error": error} if error else {}))

    def _write_line(self, record: dict[str, Any]) -> None:
        self.lines_written += 1
        print(json.dumps(record) if self.as_json else record["answer"] or "", file=self.output, flush=True)


class Conversation:
    """Handles lines that are questions or paths of images, and keeps the current image."""

    def __init__(self, predictor: Predictor, on_answer: Callable[[Prediction], object]) -> None:
        """Prepare the image encoder, so that an incomplete checkpoint is an error before the first line.

        Args:
            predictor: answers the questions.
            on_answer: called with each answer.

        Raises:
            PipelineError: the encoder's tensors are not available.
        """
        self.predictor, self.on_answer = predictor, on_answer
        self.encode = predictor.image_encoder
        self.image = Path()
        self.features: Tensor | None = None
        """Query features (Q, D) of the current image."""
        self.error = ""
        """Why the last line failed."""

    @property
    def expected_input(self) -> str:
        """What the next line should be: an image or a question."""
        return "image" if self.features is None else "question"

    def handle_line(self, line: str) -> bool:
        """Answer a question or change the image. Log the error and return False if that fails."""
        line, self.error = clean_question(line), ""
        try:
            if self.features is None or _is_image_path(line):
                self.set_image(expand_home(line))
            else:
                self.on_answer(self.predictor.predict_encoded(self.features, line, self.image))
        except ImageError as error:
            advice = "enter the path of an image" if _is_image_path(line) else "enter the path of an image first"
            self.error = f"{_shorten(line)}: {error}; {advice}"
        except PipelineError as error:
            self.error = str(error)
        if self.error:
            log_info(self.error)
        return not self.error

    def set_image(self, image: Path) -> None:
        """Change the image. If the prompt needs no question, answer at once and expect another image.

        Raises:
            ImageError: the image cannot be read or encoded.
        """
        self.features = None  # a question after a failed image must not be answered from the previous one
        self.image, self.features = image, self.encode(image)
        if not self.predictor.needs_question:
            self.on_answer(self.predictor.predict_encoded(self.features, "", image))
            self.features = None


def _prompt_for_lines(conversation: Conversation, image: str | os.PathLike[str] | None) -> None:
    """Handle `image` and then lines typed in a terminal, until an empty line or the end of input."""
    log_info(HELP)
    line = os.fspath(image) if image else _read_line(conversation.expected_input)
    while line:
        conversation.handle_line(line)
        line = _read_line(conversation.expected_input)


def _read_line(prompt: str) -> str:
    try:
        return input(f"{prompt}: ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer_lines(conversation: Conversation, image: str | os.PathLike[str] | None, writer: AnswerWriter) -> None:
    """Write one line for every line of stdin, whatever its bytes, so that line numbers match.

    Raises:
        PipelineError: `image` is invalid, or lines were not answered.
    """
    if image:
        _set_first_image(conversation, expand_home(os.fspath(image)))
    failed = 0
    for number, data in enumerate(sys.stdin.buffer):
        line = data.decode("utf-8-sig" if number == 0 else "utf-8", "replace").strip()
        written_before = writer.lines_written
        failed += bool(line) and not conversation.handle_line(line)
        if writer.lines_written == written_before:
            writer.write_unanswered(line, conversation.error if line else "")
    if failed:
        raise PipelineError(f"{failed} lines were not answered; the errors are listed above")


def _set_first_image(conversation: Conversation, image: Path) -> None:
    """Set the image given on the command line. An invalid one is fatal, because no question could be answered."""
    try:
        conversation.set_image(image)
    except ImageError as error:
        raise PipelineError(f"{image}: {error}") from None


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]}..."


def _is_image_path(line: str) -> bool:
    """Return whether the line is the path of a file, or ends like the name of an image file."""
    with suppress(OSError, ValueError):  # a question may be longer than a path can be
        if expand_home(line).is_file():
            return True
    return Path(line).suffix.lower() in Image.registered_extensions()

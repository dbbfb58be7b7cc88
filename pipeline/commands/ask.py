"""Any picture, any question: the encoder and the language half one behind the other, without a cache."""

import string
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pipeline.answers.predictor import ImageEncoder, Predictor
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.common.terminal import from_home
from pipeline.encoding.images import ImageError
from pipeline.runs.run import Run

SHOWN = 200  # characters of a line that is no picture
_INVISIBLE = string.whitespace + "\ufeff\u200b\u200c\u200d\u2060\u00a0\0"

HELP = "A question is answered, the path of a picture changes the picture, an empty line or Ctrl-D ends."


def ask(run: Run, image: Path, question: str, overrides: tuple[str, ...], with_adapter: bool) -> dict[str, Any]:
    """The answer to one question on one picture, and its probability.

    It is the answer that `evaluate` gives if the picture is in the cache. Raises `PipelineError`.
    """
    question = clean_question(question)
    config = run.trained_config(overrides)
    answerer = Predictor(run, config, with_adapter)
    answerer.check(question)
    try:
        features = ImageEncoder(config)(image)
    except ImageError as error:
        raise PipelineError(f"{image}: {error}") from None
    return answerer(image, features, question)


class Conversation:
    """Takes a user's lines, each a picture's path or a question on the last picture."""

    def __init__(
        self, run: Run, overrides: tuple[str, ...], with_adapter: bool, tell: Callable[[dict[str, Any]], object]
    ):
        """`tell` is given the summary of each answer."""
        config = run.trained_config(overrides)
        self.look, self.answer, self.tell = ImageEncoder(config), Predictor(run, config, with_adapter), tell
        self.image = Path()
        self.problem = ""
        """What was wrong with the last line."""
        self.features: Tensor | None = None
        if sys.stdin.isatty():
            log_info(HELP)

    @property
    def awaits(self) -> str:
        return "picture" if self.features is None else "question"

    def hear(self, line: str) -> bool:
        """Tell an answer, or change the picture; log what is wrong with either, and return False."""
        line, self.problem = clean_question(line), ""
        try:
            if self.features is None or _names_picture(line):
                self.show(from_home(line))
            else:
                self.tell(self.answer(self.image, self.features, line))
        except ImageError as error:
            advice = "name a picture" if _names_picture(line) else "name a picture before a question"
            self.problem = f"{_shortened(line)}: {error}; {advice}"
        except PipelineError as error:
            self.problem = str(error)
        if self.problem:
            log_info(self.problem)
        return not self.problem

    def show(self, image: Path) -> None:
        """Change the picture; where the prompt holds no question, it is answered. Raises `ImageError`."""
        self.features = None  # if this one fails, no question is answered from the one before
        self.image, self.features = image, self.look(image)
        if not self.answer.asks:
            self.tell(self.answer(image, self.features, ""))
            self.features = None


def clean_question(text: str) -> str:
    """Without what nobody sees at its ends: spaces, byte order marks, zero-width characters.

    Bytes that were no UTF-8 become the replacement character.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip(_INVISIBLE)


def _shortened(line: str) -> str:
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _names_picture(line: str) -> bool:
    """Whether it is the path of a file, or looks like one of a picture that is not there."""
    with suppress(OSError, ValueError):  # a question may be longer than a name can be
        if from_home(line).is_file():
            return True
    return Path(line).suffix.lower() in Image.registered_extensions()

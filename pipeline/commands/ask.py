"""Any picture, any question: the encoder and the language half one behind the other, without a cache."""

import string
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from cache.manifest import Manifest
from cache.spec import CacheError
from cache.text import TextTable
from pipeline.answers.generation import answer_questions
from pipeline.batches.sequences import SequenceBuilder
from pipeline.batches.split import load_tokenizer
from pipeline.blip2.base_model import load_base
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.blip2.language_model import load_adapter
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.common.terminal import expand_home
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import tokenize
from pipeline.encoding.encoder_spec import load_preprocessor
from pipeline.encoding.images import ImageError, check_header, read_image_bytes
from pipeline.runs.run import Run

SHOWN = 200  # characters of a line that is no picture
_INVISIBLE = string.whitespace + "\ufeff\u200b\u200c\u200d\u2060\u00a0\0"

HELP = "A question is answered, the path of a picture changes the picture, an empty line or Ctrl-D ends."


class EncodedImage(SequenceBuilder):
    """A picture's features with one question, as `answer_questions` takes those of a cache."""

    def __init__(self, features: Tensor, text: TextTable):
        """`features`: (Q, D), on the CPU."""
        self.text, self.query_tokens = text, len(features)
        self._features = features

    def _gather(self, rows: np.ndarray) -> Tensor:
        return self._features.expand(len(rows), -1, -1)


class ImageEncoder:
    """Picture files -> query features, as stage one makes and stores them for the run's cache."""

    def __init__(self, config: Config):
        """Raises `PipelineError` if the encoder's tensors cannot be had."""
        model = config.model
        self.folder = fetch_checkpoint(model.checkpoint, model.revision, ENCODER_PREFIXES)
        self.preprocess = load_preprocessor(self.folder)
        self.encoder_dtype, self.storage_dtype = _encoder_dtype(config), config.cache.dtype
        self.device = pick_device()

    @cached_property
    def encoder(self) -> Blip2Encoder:
        """Loaded when it is first needed: what is wrong with a picture is told before."""
        return load_encoder(self.folder, self.device, self.encoder_dtype)

    def __call__(self, path: Path) -> Tensor:
        """(Q, D), on the CPU and in the cache's dtype. Raises `ImageError`."""
        data = read_image_bytes(path)
        pixels = torch.from_numpy(self.preprocess(data))
        if check_header(data):
            log_info(f"warning: {path} has more than 8 bits a channel or float pixels: scaled to its own range")
        with torch.inference_mode():
            features = self.encoder(pixels[None].to(self.device))[0]
        stored: Tensor = features.to(getattr(torch, self.storage_dtype)).cpu()
        if not stored.isfinite().all():
            raise ImageError(f"its features are not finite in {self.storage_dtype}")
        return stored


class Predictor:
    """Questions on encoded pictures -> answers, by the run's adapter or without."""

    def __init__(self, run: Run, config: Config, with_adapter: bool):
        self.run, self.config, self.with_adapter = run, config, with_adapter
        self.tokenizer = load_tokenizer(config)
        self.asks = "{question}" in config.data.prompt
        """Whether the prompt holds a question: that of captions does not."""

    @cached_property
    def model(self) -> PreTrainedModel:
        base = load_base(self.config)
        return load_adapter(base, self.run.adapter) if self.with_adapter else base

    def check(self, question: str) -> None:
        """Raises `PipelineError` for a question that is empty, or too long for the language model."""
        if self.asks and not question.strip():
            raise PipelineError("the question is empty")
        settings = self.config.evaluate
        length = self.tokenizer.query_tokens + len(self.tokenizer.prompts([question])[0]) + settings.max_new_tokens
        if length > self.tokenizer.max_length:
            raise PipelineError(
                f"the question is too long: {length} tokens with its image and evaluate.max_new_tokens="
                f"{settings.max_new_tokens}; the language model takes {self.tokenizer.max_length}"
            )

    def __call__(self, image: Path, features: Tensor, question: str) -> dict[str, Any]:
        """The summary of one answer; `features`: (Q, D). Raises `PipelineError`."""
        started = time.perf_counter()
        self.check(question)
        text = tokenize([VQAExample(0, Path(image.name), question, ())], [0], self.tokenizer)
        asked = EncodedImage(features, text)
        answer = answer_questions(self.model, asked, np.zeros(1, np.int64), self.tokenizer, self.config.evaluate)[0]
        return {
            "run": str(self.run.path),
            "image": str(image),
            "question": question,
            "answer": answer.text,
            "probability": exp(answer.log_probability),
            "seconds": time.perf_counter() - started,
        }


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
                self.show(expand_home(line))
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
        if expand_home(line).is_file():
            return True
    return Path(line).suffix.lower() in Image.registered_extensions()


def _encoder_dtype(config: Config) -> torch.dtype:
    """That of the run's cache, if it is there and the config does not name another."""
    if config.precompute.dtype == "auto":
        with suppress(CacheError):
            return pick_dtype(Manifest.load(config.cache.dir).spec.encoder_dtype, pick_device())
    return pick_dtype(config.precompute.dtype, pick_device())

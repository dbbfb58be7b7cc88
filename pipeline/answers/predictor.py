"""Answer questions on images that are not in a cache."""

import os
import string
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import exp
from pathlib import Path

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
from pipeline.common.progress import log_warning
from pipeline.common.result import Result
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import tokenize
from pipeline.encoding.decoding import is_rescaled
from pipeline.encoding.encoder_spec import load_preprocessor
from pipeline.encoding.images import ImageError, check_header, read_image_bytes
from pipeline.runs.run import Run, RunLike

ImageInput = str | os.PathLike[str] | Image.Image
"""The path of an image file, or an image in memory."""

_INVISIBLE = string.whitespace + "\ufeff\u200b\u200c\u200d\u2060\u00a0\0"


@dataclass(frozen=True)
class Prediction(Result):
    """The answer to one question on one image."""

    run: str
    image: str | None
    """The path of the image file; None for an image in memory."""
    question: str
    answer: str
    probability: float
    """Probability of the answer's tokens, including the end token, 0 to 1."""
    seconds: float


class EncodedImage(SequenceBuilder):
    """Sequences of questions on one encoded image, for `answer_questions`."""

    def __init__(self, features: Tensor, text: TextTable) -> None:
        """Combine an image with questions on it.

        Args:
            features: the image's query features (Q, D), on the CPU.
            text: the questions, all with image row 0.
        """
        self.text, self.query_tokens = text, len(features)
        self._features = features

    def _gather(self, rows: np.ndarray) -> Tensor:
        return self._features.expand(len(rows), -1, -1)


class ImageEncoder:
    """Image -> query features, as stage one computes and stores them for the run's cache."""

    def __init__(self, config: Config) -> None:
        """Prepare the preprocessing; the encoder is loaded when the first image has been decoded.

        Raises:
            PipelineError: the encoder's tensors are not available.
        """
        model = config.model
        self.folder = fetch_checkpoint(model.checkpoint, model.revision, ENCODER_PREFIXES)
        self.preprocess = load_preprocessor(self.folder)
        self.encoder_dtype, self.storage_dtype = _encoder_dtype(config), config.cache.dtype
        self.device = pick_device()

    @cached_property
    def encoder(self) -> Blip2Encoder:
        """ViT and Q-Former."""
        return load_encoder(self.folder, self.device, self.encoder_dtype)

    def __call__(self, image: ImageInput) -> Tensor:
        """Return the query features (Q, D) of an image, on the CPU and in the cache's dtype.

        Raises:
            ImageError: the image cannot be read or encoded. The message does not name the image.
        """
        pixels = torch.from_numpy(self._pixel_values(image))
        with torch.inference_mode():
            features = self.encoder(pixels[None].to(self.device))[0]
        stored: Tensor = features.to(getattr(torch, self.storage_dtype)).cpu()
        if not stored.isfinite().all():
            raise ImageError(f"its features are not finite in {self.storage_dtype}")
        return stored

    def _pixel_values(self, image: ImageInput) -> np.ndarray:
        """Return pixel values (3, H, W), float32. Warn if they were rescaled to the range of the image."""
        if isinstance(image, Image.Image):
            pixels = self.preprocess.from_image(image)
            rescaled = is_rescaled(image)
        else:
            data = read_image_bytes(Path(image))
            pixels = self.preprocess(data)
            rescaled = check_header(data)
        if rescaled:
            log_warning(f"{describe(image)} has more than 8 bits a channel or float pixels: scaled to its own range")
        return pixels


class Predictor:
    """Answers questions on images with a trained run.

    The encoder and the language model are loaded for the first prediction and kept for later ones. An image that is in
    the run's cache gets the answer that `evaluate` gives.

    Example:
        ```python
        predictor = Predictor("runs/easy_vqa-1")
        prediction = predictor.predict("photo.jpg", "what shape is in the image?")
        print(prediction.answer, prediction.probability)
        ```
    """

    def __init__(self, run: RunLike, overrides: Sequence[str] = (), with_adapter: bool = True) -> None:
        """Open a finished run. No model is loaded yet.

        Args:
            run: a `Run`, the path of a run folder, or the result of `train`.
            overrides: `key=value` overrides of the run's config, such as `evaluate.num_beams=5`.
            with_adapter: False for the model before training.

        Raises:
            ConfigError: an override is invalid.
            PipelineError: the run has no adapter, or it is damaged.
        """
        self.run = Run.of(run)
        self.config = self.run.trained_config(tuple(overrides))
        self.with_adapter = with_adapter
        self.tokenizer = load_tokenizer(self.config)

    @property
    def needs_question(self) -> bool:
        """Whether the prompt contains the question; that of a captioning run does not."""
        return "{question}" in self.config.data.prompt

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """Image -> query features (Q, D)."""
        return ImageEncoder(self.config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The language half, with the run's adapter or without."""
        base = load_base(self.config)
        return load_adapter(base, self.run.adapter) if self.with_adapter else base

    def predict(self, image: ImageInput, question: str = "") -> Prediction:
        """Answer one question on one image.

        Args:
            image: the path of an image file, or a `PIL.Image.Image`. Both are turned upright by their EXIF
                orientation; of an image in memory that is an animation, the current frame is used.
            question: the question; it is ignored by a run whose prompt has no `{question}`.

        Raises:
            ImageError: the image cannot be read or encoded.
            PipelineError: the question is empty or too long, or a checkpoint is incomplete.
        """
        question = clean_question(question)
        self._check_question(question)
        started = time.perf_counter()
        try:
            features = self.image_encoder(image)
        except ImageError as error:
            raise ImageError(f"{describe(image)}: {error}") from None
        return self._answer(features, question, image, started)

    def predict_encoded(self, features: Tensor, question: str, image: ImageInput) -> Prediction:
        """Answer one question on an image that is encoded already.

        Args:
            features: the query features (Q, D) of `image`, from `image_encoder`.
            question: the question.
            image: the image, to be named in the prediction.

        Raises:
            PipelineError: the question is empty or too long.
        """
        self._check_question(question)
        return self._answer(features, question, image, time.perf_counter())

    def _answer(self, features: Tensor, question: str, image: ImageInput, started: float) -> Prediction:
        text = tokenize([VQAExample(0, Path("image"), question, ())], [0], self.tokenizer)
        encoded = EncodedImage(features, text)
        first = np.zeros(1, np.int64)
        answer = answer_questions(self.model, encoded, first, self.tokenizer, self.config.evaluate)[0]
        return Prediction(
            run=str(self.run.path),
            image=None if isinstance(image, Image.Image) else os.fspath(image),
            question=question,
            answer=answer.text,
            probability=exp(answer.log_probability),
            seconds=time.perf_counter() - started,
        )

    def _check_question(self, question: str) -> None:
        if self.needs_question and not question.strip():
            raise PipelineError("the question is empty")
        max_new_tokens = self.config.evaluate.max_new_tokens
        length = self.tokenizer.query_tokens + len(self.tokenizer.prompts([question])[0]) + max_new_tokens
        if length > self.tokenizer.max_length:
            raise PipelineError(
                f"the question is too long: {length} tokens with its image and evaluate.max_new_tokens="
                f"{max_new_tokens}; the language model takes {self.tokenizer.max_length}"
            )


def clean_question(text: str) -> str:
    """Strip whitespace, byte order marks and zero-width characters, and replace lone surrogates by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip(_INVISIBLE)


def describe(image: ImageInput) -> str:
    """Return the path of an image file, or the mode and size of an image in memory."""
    if isinstance(image, Image.Image):
        return f"{image.mode} image of {image.width} x {image.height} pixels"
    return os.fspath(image)


def _encoder_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the run's cache, unless it is not there or the config names another one."""
    if config.precompute.dtype == "auto":
        with suppress(CacheError):
            return pick_dtype(Manifest.load(config.cache.dir).spec.encoder_dtype, pick_device())
    return pick_dtype(config.precompute.dtype, pick_device())

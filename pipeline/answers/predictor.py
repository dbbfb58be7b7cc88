"""Answers on images that no cache holds: the encoder and the language half, loaded when needed."""

import time
from contextlib import suppress
from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cache.manifest import Manifest
from cache.spec import CacheError
from cache.text import TextTable
from pipeline.answers.generation import answer_questions
from pipeline.batches.assemble import load_base, load_tokenizer
from pipeline.batches.sequences import SequenceBuilder
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.encoder import Blip2Encoder, load_encoder
from pipeline.blip2.language_model import load_adapter
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import tokenize
from pipeline.encoding.encoder_spec import load_preprocessor
from pipeline.encoding.images import ImageError, check_header, read_image_bytes
from pipeline.runs.run import Run


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
        if length > self.tokenizer.longest:
            raise PipelineError(
                f"the question is too long: {length} tokens with its image and evaluate.max_new_tokens="
                f"{settings.max_new_tokens}; the language model takes {self.tokenizer.longest}"
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


def _encoder_dtype(config: Config) -> torch.dtype:
    """That of the run's cache, if it is there and the config does not name another."""
    if config.precompute.dtype == "auto":
        with suppress(CacheError):
            return pick_dtype(Manifest.load(config.cache.dir).spec.encoder_dtype, pick_device())
    return pick_dtype(config.precompute.dtype, pick_device())

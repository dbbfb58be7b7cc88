"""Answers of the language half to cached questions, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from pipeline.batches.sequences import SequenceBuilder, pack_prompts
from pipeline.blip2.memory import split_on_out_of_memory
from pipeline.config import EvaluateConfig
from pipeline.data.text import PromptTokenizer


class Answer(NamedTuple):
    """What the model says to one question."""

    text: str
    log_probability: float
    """Of its tokens up to the end token, natural."""


def answer_questions(
    model: PreTrainedModel,
    builder: SequenceBuilder,
    questions: np.ndarray,
    tokenizer: PromptTokenizer,
    settings: EvaluateConfig,
    on_done: Callable[[int], object] = lambda count: None,
) -> dict[int, Answer]:
    """The answer to each question, by its number in the split; `on_done` is told how many more are answered.

    Raises `PipelineError` if memory is too short for a single question.
    """
    answers: dict[int, Answer] = {}
    advice = f"{settings.num_beams} beams are kept for it: try fewer evaluate.num_beams"
    for batch in _batches(builder, questions, settings.batch_size):
        for part in split_on_out_of_memory(
            lambda some: _generate(model, builder, some, tokenizer, settings), batch, advice
        ):
            answers |= part
        on_done(len(batch))
    return answers


def _batches(builder: SequenceBuilder, questions: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """Questions on an image stand together, and images whose questions are about as long."""
    images, image = np.unique(builder.text.image_row[questions], return_inverse=True)
    longest = np.zeros(len(images), np.int64)
    np.maximum.at(longest, image, np.diff(builder.text.prompt_ids.offsets)[questions])
    batch: list[int] = []
    for _, group in groupby(np.lexsort((image, longest[image])), key=lambda place: image[place]):
        on_image = [int(questions[place]) for place in group]
        if batch and len(batch) + len(on_image) > batch_size:
            yield batch
            batch = []
        batch += on_image
        while len(batch) > batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def _generate(
    model: PreTrainedModel,
    builder: SequenceBuilder,
    batch: Sequence[int],
    tokenizer: PromptTokenizer,
    settings: EvaluateConfig,
) -> dict[int, Answer]:
    device = next(model.parameters()).device
    inputs = pack_prompts(builder.for_generation(batch))
    beams = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    with torch.inference_mode():
        found = model.generate(
            **send_to_device(inputs, device),
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            **beams,
        )
    texts = tokenizer.decode(found.tokens.tolist())
    return {
        number: Answer(text, log_probability)
        for number, text, log_probability in zip(batch, texts, found.log_probability.tolist(), strict=True)
    }

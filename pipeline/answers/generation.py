"""Generate answers to cached questions with the language half, in batches."""

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


class GeneratedAnswer(NamedTuple):
    """The generated answer to one question."""

    text: str
    log_probability: float
    """Natural logarithm of the probability of its tokens, including the end token."""


def answer_questions(
    model: PreTrainedModel,
    builder: SequenceBuilder,
    questions: np.ndarray,
    tokenizer: PromptTokenizer,
    settings: EvaluateConfig,
    on_batch: Callable[[int], object] = lambda count: None,
) -> dict[int, GeneratedAnswer]:
    """Generate the answer to each question.

    A batch that does not fit into memory is split in halves.

    Args:
        model: the language half, with or without an adapter.
        builder: sequences of the split that holds the questions.
        questions: (N,) indices of questions in the split.
        tokenizer: decodes the generated tokens.
        settings: batch size, beams and length limits.
        on_batch: called after each batch with its number of questions.

    Returns:
        The answers by question index.

    Raises:
        PipelineError: out of memory with a single question.
    """
    answers: dict[int, GeneratedAnswer] = {}
    advice = f"{settings.num_beams} beams are kept for it: try fewer evaluate.num_beams"
    for batch in _batches(builder, questions, settings.batch_size):
        for part in split_on_out_of_memory(
            lambda indices: _generate(model, builder, indices, tokenizer, settings), batch, advice
        ):
            answers |= part
        on_batch(len(batch))
    return answers


def _batches(builder: SequenceBuilder, questions: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """Yield batches that keep the questions on an image together, and images with prompts of similar length."""
    images, image = np.unique(builder.text.image_row[questions], return_inverse=True)
    longest_prompt = np.zeros(len(images), np.int64)
    np.maximum.at(longest_prompt, image, np.diff(builder.text.prompt_ids.offsets)[questions])
    order = np.lexsort((image, longest_prompt[image]))
    batch: list[int] = []
    for _, group in groupby(order, key=lambda position: image[position]):
        on_image = [int(questions[position]) for position in group]
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
) -> dict[int, GeneratedAnswer]:
    device = next(model.parameters()).device
    inputs = pack_prompts(builder.for_generation(batch))
    beam_settings = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    with torch.inference_mode():
        output = model.generate(
            **send_to_device(inputs, device),
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            **beam_settings,
        )
    texts = tokenizer.decode(output.tokens.tolist())
    return {
        question: GeneratedAnswer(text, log_probability)
        for question, text, log_probability in zip(batch, texts, output.log_probability.tolist(), strict=True)
    }

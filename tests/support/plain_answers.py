"""Predictions of plain transformers, and a comparison that allows for ties.

Two programs that compute the same function may predict different tokens if two tokens are equally probable up to
rounding, which depends on the processor. A different prediction is therefore accepted only if the plain model prefers
its own by less than the two programs can differ. All other predictions must be equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer

BATCH = 50


@dataclass(frozen=True)
class PlainAnswer:
    """Prediction of the full model for one question, with its scores."""

    text: str
    tokens: list[int]
    logits: Tensor
    """(T, vocabulary) for each token; empty for beam search."""
    beams: dict[str, float]
    """Final text and score of every beam; empty for greedy search."""

    def preference(self, other: str, tokenizer: PromptTokenizer) -> float:
        """Return the margin to `other`: of logits at the first different token, or of beam scores."""
        if self.beams:
            return self.beams[self.text] - self.beams.get(other, float("-inf"))
        tokens = tokenizer.targets([other])[0]
        place = next((n for n, pair in enumerate(zip(self.tokens, tokens, strict=False)) if len(set(pair)) > 1), None)
        if place is None:
            return float("inf")
        return float(self.logits[place, self.tokens[place]] - self.logits[place, tokens[place]])


def plain_answers(
    model: PreTrainedModel, processor: Any, examples: Sequence[VQAExample], **settings: Any
) -> Iterator[PlainAnswer]:
    """Predict as the recipe does: images and prompts through the processor, `generate` on the full model."""
    beams = settings.get("num_beams", 1)
    for start in range(0, len(examples), BATCH):
        some = examples[start : start + BATCH]
        inputs = processor(
            images=[Image.open(example.image) for example in some],
            text=[f"Question: {example.question} Answer:" for example in some],
            padding=True,
            return_tensors="pt",
        ).to(dtype=model.dtype)
        found = model.generate(
            **inputs,
            do_sample=False,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_logits=beams == 1,
            output_scores=True,
            **{"max_new_tokens": 10, **settings},
        )
        new = found.sequences[:, inputs["input_ids"].shape[1] :]  # the full model returns the prompt too
        texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        for place in range(0, len(new), beams):
            logits = torch.stack([step[place] for step in found.logits]).float() if beams == 1 else torch.empty(0)
            scores = found.sequences_scores[place : place + beams].tolist() if beams > 1 else []
            by_text = dict(zip(reversed(texts[place : place + beams]), reversed(scores), strict=False))
            yield PlainAnswer(texts[place], new[place].tolist(), logits, by_text)


def assert_equal_but_for_ties(
    answers: Sequence[str], plain: Sequence[PlainAnswer], tokenizer: PromptTokenizer, apart: float
) -> None:
    """Assert that the predictions are equal except for ties.

    If logits differ by at most `apart`, the margin of two logits differs by at most twice that.
    """
    assert len(answers) == len(plain)
    for answer, one in zip(answers, plain, strict=True):
        if answer != one.text:
            preference = one.preference(answer, tokenizer)
            assert preference <= 2 * apart, f"{answer!r} is not {one.text!r}, preferred by {preference:.3g}"

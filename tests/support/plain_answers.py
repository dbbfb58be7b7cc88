"""Answers of plain transformers, and whether others differ from them only where rounding decides.

Two programs that compute the same function may say different things where two tokens are equally probable but for
rounding, which every processor does in its own way. So a different answer is accepted only where the plain model
itself hardly prefers its own, by less than the two programs' numbers can differ; how many such ties there are is
nobody's fault. Everything else must be equal.
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
    """What the full model says to one question, and how much it prefers that."""

    text: str
    tokens: list[int]
    logits: Tensor
    """(T, vocabulary), before each of the tokens; empty for beam search."""
    beams: dict[str, float]
    """The text of every beam at the end and its score; empty for greedy search."""

    def preference(self, other: str, tokenizer: PromptTokenizer) -> float:
        """How much the model prefers its answer to `other`: in logits where they part, or in a beam's score."""
        if self.beams:
            return self.beams[self.text] - self.beams.get(other, float("-inf"))
        said = tokenizer.targets([other])[0]
        place = next((n for n, pair in enumerate(zip(self.tokens, said, strict=False)) if len(set(pair)) > 1), None)
        if place is None:
            return float("inf")
        return float(self.logits[place, self.tokens[place]] - self.logits[place, said[place]])


def plain_answers(
    model: PreTrainedModel, processor: Any, examples: Sequence[VQAExample], **settings: Any
) -> Iterator[PlainAnswer]:
    """The recipe's way: pictures and prompts through the processor, `generate` on the full model."""
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
        new = found.sequences[:, inputs["input_ids"].shape[1] :]  # the full model gives the prompt back too
        texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        for place in range(0, len(new), beams):
            logits = torch.stack([step[place] for step in found.logits]).float() if beams == 1 else torch.empty(0)
            scores = found.sequences_scores[place : place + beams].tolist() if beams > 1 else []
            by_text = dict(zip(reversed(texts[place : place + beams]), reversed(scores), strict=False))
            yield PlainAnswer(texts[place], new[place].tolist(), logits, by_text)


def assert_equal_but_for_ties(
    answers: Sequence[str], plain: Sequence[PlainAnswer], tokenizer: PromptTokenizer, apart: float
) -> None:
    """Of logits that are `apart` from each other at most, a preference, which is of two, may be off by twice that.

    Raises:
        AssertionError: an answer differs that the plain model clearly prefers another to.
    """
    assert len(answers) == len(plain)
    for answer, one in zip(answers, plain, strict=True):
        if answer != one.text:
            preference = one.preference(answer, tokenizer)
            assert preference <= 2 * apart, f"{answer!r} is not {one.text!r}, preferred by {preference:.3g}"

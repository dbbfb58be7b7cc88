"""Random questions with the statistics of VQAv2, for benchmarks without a dataset."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import Blip2Config

from pipeline.batches.sequences import ImageSequence
from pipeline.blip2.prefix_tree import PromptTarget, build_prefix_tree

PROMPT_START, PROMPT_END = (2, 45641, 35), (31652, 35)
"""Tokens of BOS and "Question:", and of " Answer:". Nothing after the question can be shared."""


@dataclass(frozen=True)
class Question:
    """A question about an image, as token ids."""

    image: int
    prompt: list[int]
    target: list[int]


def make_questions(count: int, config: Blip2Config, seed: int = 0) -> list[Question]:
    """Return `count` random questions, image by image."""
    rng = np.random.default_rng(seed)
    vocabulary = config.text_config.vocab_size
    start, end = ([token % vocabulary for token in tokens] for tokens in (PROMPT_START, PROMPT_END))
    questions: list[Question] = []
    for image in range(count):
        for _ in range(min(3 + rng.poisson(2.36), count - len(questions))):
            words = rng.integers(3, vocabulary - 1, 3 + rng.poisson(4.2)).tolist()
            target = rng.integers(3, vocabulary - 1, 1 + rng.poisson(0.4)).tolist()
            prompt = [*start, *words, *end]
            questions.append(Question(image, prompt, [*target, config.text_config.eos_token_id % vocabulary]))
    return questions


def sequences_of(questions: list[Question], config: Blip2Config, share: bool) -> list[ImageSequence]:
    """Return the sequences of the questions with random features: one per image if `share`, else one per question."""
    generator = torch.Generator().manual_seed(0)
    shape = config.num_query_tokens, config.qformer_config.hidden_size
    groups: dict[int, list[Question]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(question.image if share else number, []).append(question)
    return [
        ImageSequence(
            torch.randn(shape, generator=generator).half(),
            build_prefix_tree(shape[0], [PromptTarget(one.prompt, one.target) for one in group]),
            len(group),
        )
        for group in groups.values()
    ]

"""Choose the training targets among the annotators' answers: one sampled each epoch, or all of them."""

from collections import Counter
from typing import Literal

import numpy as np

from cache.text import Ragged, TextTable
from pipeline.common.progress import with_bar
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer

Choice = Literal["sampled", "all"]


class Targets:
    """The answers of a split's questions as tokens, weighted by the number of annotators who gave them.

    `sampled` returns one answer per question, by seed and epoch. `all` returns every distinct answer, with weights that
    sum to 1.
    """

    def __init__(self, text: TextTable, tokenizer: PromptTokenizer, choice: Choice, seed: int) -> None:
        """Tokenize every distinct answer once."""
        self.choice, self.seed = choice, seed
        index_of: dict[str, int] = {}
        answers: list[int] = []
        counts: list[int] = []
        offsets = [0]
        for number in with_bar("answers", range(len(text)), "questions"):
            for answer, count in Counter(VQAExample.from_record(text.record(number)).trainable_answers).items():
                answers.append(index_of.setdefault(answer, len(index_of)))
                counts.append(count)
            offsets.append(len(answers))
        self._tokens = Ragged.from_rows(tokenizer.targets(list(index_of)), np.int32)
        self._answers, self._counts = np.array(answers, np.int64), np.array(counts, np.int64)
        self._offsets = np.array(offsets)
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, question: int, epoch: int) -> list[tuple[np.ndarray, float]]:
        """Return the targets of a question that has answers: tokens and weight of each."""
        own = slice(self._offsets[question], self._offsets[question + 1])
        weights = self._counts[own] / self._counts[own].sum()
        tokens = [self._tokens[answer] for answer in self._answers[own]]
        if self.choice == "all":
            return list(zip(tokens, weights.tolist(), strict=True))
        position = np.searchsorted(weights.cumsum(), self._sampled(epoch)[question], side="right")
        return [(tokens[min(int(position), len(tokens) - 1)], 1.0)]  # the sum may stay below 1

    def longest(self) -> np.ndarray:
        """Return the number of tokens of each question's longest answer, 0 without an answer: (questions,)."""
        lengths = np.zeros(len(self._offsets) - 1, np.int64)
        question = np.repeat(np.arange(len(lengths)), np.diff(self._offsets))
        np.maximum.at(lengths, question, np.diff(self._tokens.offsets)[self._answers])
        return lengths

    def _sampled(self, epoch: int) -> np.ndarray:
        """Return a random number in [0, 1) for each question."""
        if self._draws[0] != epoch:
            self._draws = epoch, np.random.default_rng([self.seed, epoch, 1]).random(len(self._offsets) - 1)
        return self._draws[1]

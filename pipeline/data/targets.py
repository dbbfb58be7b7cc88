"""Which of people's answers a question is trained to say: the most common, one drawn anew each epoch, or all."""

from collections import Counter
from typing import Literal

import numpy as np

from cache.text import Ragged, TextTable
from pipeline.common.progress import with_bar
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer

Choice = Literal["sampled", "all"]


class Targets:
    """The answers of a split's questions as tokens, each distinct one once, in proportion to the people who gave it.

    `sampled` gives a question one of its answers, by seed and epoch; `all` gives every one, with weights that sum to 1.
    """

    def __init__(self, text: TextTable, tokenizer: PromptTokenizer, choice: Choice, seed: int) -> None:
        self.choice, self.seed = choice, seed
        spelled: dict[str, int] = {}
        answers: list[int] = []
        people: list[int] = []
        offsets = [0]
        for number in with_bar("answers", range(len(text)), "questions"):
            for answer, count in Counter(VQAExample.from_record(text.record(number)).trainable_answers).items():
                answers.append(spelled.setdefault(answer, len(spelled)))
                people.append(count)
            offsets.append(len(answers))
        self._tokens = Ragged.from_rows(tokenizer.targets(list(spelled)), np.int32)
        self._answers, self._people = np.array(answers, np.int64), np.array(people, np.int64)
        self._offsets = np.array(offsets)
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, question: int, epoch: int) -> list[tuple[np.ndarray, float]]:
        """What is to be said to a question that has an answer: tokens, and their weight."""
        own = slice(self._offsets[question], self._offsets[question + 1])
        shares = self._people[own] / self._people[own].sum()
        tokens = [self._tokens[answer] for answer in self._answers[own]]
        if self.choice == "all":
            return list(zip(tokens, shares.tolist(), strict=True))
        place = np.searchsorted(shares.cumsum(), self._sampled(epoch)[question], side="right")
        return [(tokens[min(int(place), len(tokens) - 1)], 1.0)]  # a sum of shares may stay below 1

    def longest(self) -> np.ndarray:
        """(questions,) tokens of each one's longest answer; 0 without an answer."""
        lengths = np.zeros(len(self._offsets) - 1, np.int64)
        question = np.repeat(np.arange(len(lengths)), np.diff(self._offsets))
        np.maximum.at(lengths, question, np.diff(self._tokens.offsets)[self._answers])
        return lengths

    def _sampled(self, epoch: int) -> np.ndarray:
        """A number from 0 to 1 for each question."""
        if self._draws[0] != epoch:
            self._draws = epoch, np.random.default_rng([self.seed, epoch, 1]).random(len(self._offsets) - 1)
        return self._draws[1]

"""Cache rows + token rows -> the language half's inputs. How questions are laid into sequences is decided here alone.

A sequence is the Q query tokens of an image, then BOS, the prompt and, in training, the target. Q query
tokens, B sequences, S positions in the longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.reader import FeatureReader
from cache.text import TextTable
from pipeline.language_model import IGNORED

Questions = Sequence[int] | np.ndarray  # numbers of questions in the split

PAD = 0  # any id that the embedding has: padding and image positions are masked or overwritten


class Batch(NamedTuple):
    """Inputs of `Blip2LanguageHalf`, by its argument names; `_asdict()` spreads them."""

    query_features: Tensor  # (B, Q, D)
    input_ids: Tensor  # (B, S)
    image_mask: Tensor  # (B, S) bool
    attention_mask: Tensor  # (B, S)


class Batcher:
    """Lays out questions, given by their numbers in a split's `TextTable`."""

    def __init__(self, features: FeatureReader, text: TextTable):
        self.features, self.text = features, text
        self.query_tokens = features.spec.query_tokens

    def for_training(self, questions: Questions) -> dict[str, Tensor]:
        """Padded on the right; with `labels` (B, S): the target's tokens, `IGNORED` elsewhere."""
        prompts = [self.text.prompt_ids[i] for i in questions]
        targets = [self.text.target_ids[i] for i in questions]
        texts = [np.concatenate(pair) for pair in zip(prompts, targets, strict=True)]
        length = self.query_tokens + max(map(len, texts))
        labels = np.full((len(questions), length), IGNORED, np.int64)
        for row, prompt, target in zip(labels, prompts, targets, strict=True):
            start = self.query_tokens + len(prompt)
            row[start : start + len(target)] = target
        batch = self._lay_out(questions, texts, starts=[0] * len(questions), length=length)
        return {**batch._asdict(), "labels": torch.from_numpy(labels)}

    def for_generation(self, questions: Questions) -> Batch:
        """Prompts alone, padded on the left."""
        prompts = [self.text.prompt_ids[i] for i in questions]
        longest = max(map(len, prompts))
        starts = [longest - len(prompt) for prompt in prompts]
        return self._lay_out(questions, prompts, starts, self.query_tokens + longest)

    def _lay_out(self, questions: Questions, texts: list[np.ndarray], starts: list[int], length: int) -> Batch:
        """One sequence a question; sequence i begins, with its image, at position `starts[i]`."""
        input_ids = np.full((len(questions), length), PAD, np.int64)
        image_mask = np.zeros(input_ids.shape, bool)
        attention_mask = np.zeros(input_ids.shape, np.int64)
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            text_start = start + self.query_tokens
            image_mask[row, start:text_start] = True
            input_ids[row, text_start : text_start + len(text)] = text
            attention_mask[row, start : text_start + len(text)] = 1
        return Batch(
            query_features=self._gather(self.text.image_row[np.asarray(questions)]),
            input_ids=torch.from_numpy(input_ids),
            image_mask=torch.from_numpy(image_mask),
            attention_mask=torch.from_numpy(attention_mask),
        )

    def _gather(self, rows: np.ndarray) -> Tensor:
        features = torch.from_numpy(self.features.gather(rows))
        return features.view(torch.bfloat16) if self.features.spec.dtype == "bfloat16" else features

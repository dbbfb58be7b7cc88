"""Sequences of the language model from cached features and tokens.

A sequence is the Q query tokens of one image followed by the prefix tree of some questions about it. This module alone
decides which questions share a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.reader import FeatureReader
from cache.text import TextTable
from pipeline.blip2.prefix_tree import PrefixTree, PromptTarget, build_prefix_tree

Questions = Sequence[int] | np.ndarray
"""Indices of questions in a split."""
TargetsOf = Callable[[int], list[tuple[np.ndarray, float]]]
"""Maps a question to its targets: the tokens of each and their weight in the loss."""

MAX_QUESTIONS_PER_SEQUENCE = 32
"""The cost of attention within a sequence is quadratic in its tokens."""
MAX_TOKENS_PER_BLOCK = 128
"""Consecutive sequences share a block of attention up to this length."""


@dataclass(frozen=True, eq=False)
class ImageSequence:
    """One image and some questions about it."""

    query_features: Tensor
    """(Q, D)"""
    tree: PrefixTree
    num_questions: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the language model computes."""
        return len(self.tree.position_ids)


SequenceBatch = list[ImageSequence]
"""Sequences of one optimizer step, or of one of its micro-batches."""


class SequenceBuilder:
    """Builds the sequences of questions, which are given by their indices in a split's `TextTable`."""

    def __init__(self, features: FeatureReader, text: TextTable):
        self.features, self.text = features, text
        self.query_tokens = features.spec.query_tokens

    def for_training(
        self,
        questions: Questions,
        share_prefix: bool = True,
        max_questions: int = MAX_QUESTIONS_PER_SEQUENCE,
        targets: TargetsOf | None = None,
    ) -> SequenceBatch:
        """Build sequences of prompts and targets.

        Args:
            questions: may be empty: the result is then one sequence without labels, because every rank must take part
                in every step.
            share_prefix: build one sequence per image instead of one per question.
            max_questions: bound of the questions in a sequence.
            targets: targets of each question; by default the target in the text table.
        """
        if len(questions) == 0:
            return [without_labels(sequence) for sequence in self.for_training([0])]
        prompt_ids, target_ids = self.text.prompt_ids, self.text.target_ids

        def texts(question: int) -> list[PromptTarget]:
            chosen = targets(question) if targets else [(target_ids[question], 1.0)]
            return [PromptTarget(prompt_ids[question], target, weight) for target, weight in chosen]

        return self._build_sequences(questions, texts, max_questions if share_prefix else 1)

    def for_generation(self, questions: Questions) -> SequenceBatch:
        """Build one sequence of prompts per image. The label of a prompt is its last token.

        The order of the questions is kept if those on an image are consecutive.
        """
        prompt_ids = self.text.prompt_ids

        def texts(question: int) -> list[PromptTarget]:
            return [PromptTarget(prompt_ids[question][:-1], prompt_ids[question][-1:])]

        return self._build_sequences(questions, texts, len(questions))

    def _build_sequences(
        self, questions: Questions, texts: Callable[[int], list[PromptTarget]], max_questions: int
    ) -> SequenceBatch:
        rows = self.text.image_row[np.asarray(questions)].tolist()
        place_of_row = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        features = self._gather(np.fromiter(place_of_row, np.int64))
        by_image = sorted(zip(rows, questions, strict=True), key=lambda pair: place_of_row[pair[0]])
        sequences = []
        for row, pairs in groupby(by_image, key=lambda pair: pair[0]):
            on_image = [int(question) for _, question in pairs]
            for start in range(0, len(on_image), max_questions):
                group = on_image[start : start + max_questions]
                tree = build_prefix_tree(self.query_tokens, [text for one in group for text in texts(one)])
                sequences.append(ImageSequence(features[place_of_row[row]], tree, len(group)))
        return sequences

    def _gather(self, rows: np.ndarray) -> Tensor:
        return gather_features(self.features, rows)


def gather_features(features: FeatureReader, rows: np.ndarray) -> Tensor:
    """Return the query features of some rows of a cache, (rows, Q, D), in the dtype of the cache."""
    gathered = torch.from_numpy(features.gather(rows))
    return gathered.view(torch.bfloat16) if features.spec.dtype == "bfloat16" else gathered


def without_labels(sequence: ImageSequence) -> ImageSequence:
    """Return the sequence with no labels, whose loss is zero."""
    empty = np.empty(0, np.int64)
    tree = replace(sequence.tree, label_nodes=empty, labels=empty, label_weights=np.empty(0, np.float32))
    return replace(sequence, tree=tree, num_questions=0)


def micro_batches(
    sequences: Sequence[ImageSequence], size: Callable[[ImageSequence], int], max_size: int
) -> list[SequenceBatch]:
    """Group sequences into few micro-batches of at most `max_size` in total `size` (first fit, decreasing).

    A sequence that is larger than `max_size` gets a micro-batch of its own.
    """
    groups: list[SequenceBatch] = []
    free: list[int] = []
    for sequence in sorted(sequences, key=size, reverse=True):
        needed = size(sequence)
        place = next((place for place, left in enumerate(free) if needed <= left), len(groups))
        if place == len(groups):
            groups.append([])
            free.append(max_size)
        groups[place].append(sequence)
        free[place] -= needed
    return groups


def pack(sequences: Sequence[ImageSequence]) -> dict[str, Any]:
    """Return the inputs of `Blip2LanguageHalf.forward`: the sequences concatenated, without padding."""
    trees = [sequence.tree for sequence in sequences]
    starts = np.cumsum([0, *(sequence.num_tokens for sequence in sequences)])
    label_indices = [tree.label_nodes + start for tree, start in zip(trees, starts, strict=False)]
    return {
        "query_features": torch.stack([sequence.query_features for sequence in sequences]),
        "input_ids": torch.from_numpy(np.concatenate([tree.input_ids for tree in trees])),
        "text_lengths": [len(tree.input_ids) for tree in trees],
        "position_ids": torch.from_numpy(np.concatenate([tree.position_ids for tree in trees])),
        "block_masks": [torch.from_numpy(mask) for mask in _block_masks([tree.mask for tree in trees])],
        "label_indices": torch.from_numpy(np.concatenate(label_indices)),
        "labels": torch.from_numpy(np.concatenate([tree.labels for tree in trees])),
        "label_weights": torch.from_numpy(np.concatenate([tree.label_weights for tree in trees])),
    }


def pack_prompts(sequences: Sequence[ImageSequence]) -> dict[str, Any]:
    """Return the inputs of `Blip2LanguageHalf.generate` for sequences built by `for_generation`."""
    inputs = pack(sequences)
    paths = []
    start = 0
    for sequence in sequences:
        # Parents come before children: the nodes that a node attends to are, in order, its path from the root.
        paths += [start + np.flatnonzero(sequence.tree.mask[node]) for node in sequence.tree.label_nodes]
        start += sequence.num_tokens
    longest = max(map(len, paths))
    padded = [np.pad(path, (longest - len(path), 0), constant_values=-1) for path in paths]
    trees = {name: value for name, value in inputs.items() if not name.startswith("label")}
    return {**trees, "paths": torch.from_numpy(np.stack(padded)), "last_tokens": inputs["labels"]}


def _block_masks(masks: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Merge consecutive small masks into block-diagonal ones, to launch fewer attention products."""
    blocks: list[list[np.ndarray]] = []
    for mask in masks:
        if blocks and sum(map(len, blocks[-1])) + len(mask) <= MAX_TOKENS_PER_BLOCK:
            blocks[-1].append(mask)
        else:
            blocks.append([mask])
    for block in blocks:
        merged = np.zeros((sum(map(len, block)),) * 2, bool)
        start = 0
        for mask in block:
            merged[start : start + len(mask), start : start + len(mask)] = mask
            start += len(mask)
        yield merged

"""Cache rows + token rows -> the language half's inputs. How questions are laid into sequences is decided here alone.

A sequence is one image's Q query tokens and the token tree of some questions about it.
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

Questions = Sequence[int] | np.ndarray  # numbers of questions in the split
TargetsOf = Callable[[int], list[tuple[np.ndarray, float]]]  # question -> what is to be said, as tokens, and its weight

MOST_QUESTIONS = 32
"""In one tree: attention within a tree takes the square of its nodes."""
BLOCK_NODES = 128
"""In one product of attention, as long as trees are smaller."""


@dataclass(frozen=True, eq=False)
class ImageSequence:
    """One image and some questions about it."""

    query_features: Tensor
    """(Q, D)"""
    tree: PrefixTree
    questions: int

    @property
    def nodes(self) -> int:
        """Tokens that the language model computes."""
        return len(self.tree.position_ids)


class SequenceBuilder:
    """Lays out questions, given by their numbers in a split's `TextTable`."""

    def __init__(self, features: FeatureReader, text: TextTable):
        self.features, self.text = features, text
        self.query_tokens = features.spec.query_tokens

    def for_training(
        self,
        questions: Questions,
        share_prefix: bool = True,
        most: int = MOST_QUESTIONS,
        targets: TargetsOf | None = None,
    ) -> list[ImageSequence]:
        """A sequence an image, with at most `most` questions; or one a question, without `share_prefix`.

        What is to be said to a question is the text's target, or what `targets` gives. No question gives one sequence
        without a label: a process must take part in a step that has nothing for it.
        """
        if len(questions) == 0:
            return [unlabelled(sequence) for sequence in self.for_training([0])]
        prompt_ids, target_ids = self.text.prompt_ids, self.text.target_ids

        def texts(question: int) -> list[PromptTarget]:
            wanted = targets(question) if targets else [(target_ids[question], 1.0)]
            return [PromptTarget(prompt_ids[question], target, weight) for target, weight in wanted]

        return self._build_sequences(questions, texts, most if share_prefix else 1)

    def for_generation(self, questions: Questions) -> list[ImageSequence]:
        """A sequence an image, of its questions' prompts; a prompt's last token is its label.

        The questions stay in order if those on an image stand together.
        """
        prompt_ids = self.text.prompt_ids

        def texts(question: int) -> list[PromptTarget]:
            return [PromptTarget(prompt_ids[question][:-1], prompt_ids[question][-1:])]

        return self._build_sequences(questions, texts, len(questions))

    def _build_sequences(
        self, questions: Questions, texts: Callable[[int], list[PromptTarget]], most: int
    ) -> list[ImageSequence]:
        rows = self.text.image_row[np.asarray(questions)].tolist()
        distinct = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        features = self._gather(np.fromiter(distinct, np.int64))
        by_image = sorted(zip(rows, questions, strict=True), key=lambda pair: distinct[pair[0]])
        sequences = []
        for row, pairs in groupby(by_image, key=lambda pair: pair[0]):
            numbers = [int(number) for _, number in pairs]
            for some in _chunks(numbers, most):
                tree = build_prefix_tree(self.query_tokens, [text for number in some for text in texts(number)])
                sequences.append(ImageSequence(features[distinct[row]], tree, len(some)))
        return sequences

    def _gather(self, rows: np.ndarray) -> Tensor:
        features = torch.from_numpy(self.features.gather(rows))
        return features.view(torch.bfloat16) if self.features.spec.dtype == "bfloat16" else features


def unlabelled(sequence: ImageSequence) -> ImageSequence:
    """The same, with a loss of zero."""
    nothing = np.empty(0, np.int64)
    tree = replace(sequence.tree, label_nodes=nothing, labels=nothing, label_weights=np.empty(0, np.float32))
    return replace(sequence, tree=tree, questions=0)


def micro_batches(
    sequences: Sequence[ImageSequence], size: Callable[[ImageSequence], int], most: int
) -> list[list[ImageSequence]]:
    """As few groups as will do, each of at most `most` in `size` together; a larger sequence has one of its own."""
    groups: list[list[ImageSequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=size, reverse=True):
        needed = size(sequence)
        place = next((place for place, left in enumerate(room) if needed <= left), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(most)
        groups[place].append(sequence)
        room[place] -= needed
    return groups


def pack(sequences: Sequence[ImageSequence]) -> dict[str, Any]:
    """Inputs of `Blip2LanguageHalf.forward`: the trees one behind the other, without padding."""
    trees = [sequence.tree for sequence in sequences]
    starts = np.cumsum([0, *(sequence.nodes for sequence in sequences)])
    label_nodes = [tree.label_nodes + start for tree, start in zip(trees, starts, strict=False)]
    return {
        "query_features": torch.stack([sequence.query_features for sequence in sequences]),
        "input_ids": torch.from_numpy(np.concatenate([tree.input_ids for tree in trees])),
        "text_lengths": [len(tree.input_ids) for tree in trees],
        "position_ids": torch.from_numpy(np.concatenate([tree.position_ids for tree in trees])),
        "block_masks": [torch.from_numpy(mask) for mask in _block_masks([tree.mask for tree in trees])],
        "label_nodes": torch.from_numpy(np.concatenate(label_nodes)),
        "labels": torch.from_numpy(np.concatenate([tree.labels for tree in trees])),
        "label_weights": torch.from_numpy(np.concatenate([tree.label_weights for tree in trees])),
    }


def pack_prompts(sequences: Sequence[ImageSequence]) -> dict[str, Any]:
    """Inputs of `Blip2LanguageHalf.generate`, of sequences laid out for it."""
    inputs = pack(sequences)
    paths = []
    start = 0
    for sequence in sequences:
        # Nodes stand behind their parents: what a node sees is, in order, the way to it.
        paths += [start + np.flatnonzero(sequence.tree.mask[node]) for node in sequence.tree.label_nodes]
        start += sequence.nodes
    longest = max(map(len, paths))
    filled = [np.pad(path, (longest - len(path), 0), constant_values=-1) for path in paths]
    trees = {name: value for name, value in inputs.items() if not name.startswith("label")}
    return {**trees, "paths": torch.from_numpy(np.stack(filled)), "last_tokens": inputs["labels"]}


def _block_masks(masks: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Neighbours that are small together become one block, in which none sees the other: fewer products to start."""
    blocks: list[list[np.ndarray]] = []
    for mask in masks:
        if blocks and sum(map(len, blocks[-1])) + len(mask) <= BLOCK_NODES:
            blocks[-1].append(mask)
        else:
            blocks.append([mask])
    for block in blocks:
        whole = np.zeros((sum(map(len, block)),) * 2, bool)
        start = 0
        for mask in block:
            whole[start : start + len(mask), start : start + len(mask)] = mask
            start += len(mask)
        yield whole


def _chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))

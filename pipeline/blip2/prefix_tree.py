"""Prefix tree over the texts of one image: a prefix that several texts share is stored and computed once.

The root is the image, a chain of Q query tokens. Below it are the texts, each a prompt followed by its target. Texts
that begin with the same tokens share those nodes: always "Question:", often "what is the". A node attends to the image,
to its ancestors and to itself, and its position is its depth. Each text is therefore computed exactly as if it stood
alone behind the image. The tree of a single text is a plain sequence.

Shapes: Q query tokens, T text nodes, S = Q + T nodes in total, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Tokens = Sequence[int] | np.ndarray

_ROOT = -1
"""Parent of the first text nodes: the last query token."""


class PromptTarget(NamedTuple):
    """A prompt and the target that follows it, as token ids."""

    prompt: Tokens
    target: Tokens
    weight: float = 1.0
    """Weight of each target token in the loss."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Texts on one image as inputs of the language model."""

    input_ids: np.ndarray
    """(T,) int64: tokens of the text nodes, parents before children."""
    position_ids: np.ndarray
    """(S,) int64: positions of the query tokens and the text nodes."""
    mask: np.ndarray
    """(S, S) bool: whether node i attends to node j."""
    label_nodes: np.ndarray
    """(L,) int64: index, among all S nodes, of the node whose output predicts the label."""
    labels: np.ndarray
    """(L,) int64: token ids, the targets concatenated."""
    label_weights: np.ndarray
    """(L,) float32: weight of each label in the loss."""


class _TextNodes:
    """Text nodes in the order of their creation."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def child(self, parent: int, token: int) -> int:
        """Return the child of `parent` with this token, adding it if there is none."""
        key = parent, token
        if key not in self._children:
            self._children[key] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return self._children[key]


def build_prefix_tree(num_query_tokens: int, texts: Sequence[PromptTarget]) -> PrefixTree:
    """Build the prefix tree of several texts.

    The last token of a target is a label only: nothing follows it, so it has no node.
    """
    nodes = _TextNodes()
    label_nodes: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for prompt, target, weight in texts:
        node = _ROOT
        for token in prompt:
            node = nodes.child(node, int(token))
        for index, label in enumerate(target):
            if index > 0:
                node = nodes.child(node, int(target[index - 1]))
            label_nodes.append(node)
            labels.append(int(label))
            weights.append(weight)
    return PrefixTree(
        input_ids=np.array(nodes.tokens, np.int64),
        position_ids=_positions(num_query_tokens, nodes.parents),
        mask=_mask(num_query_tokens, nodes.parents),
        label_nodes=num_query_tokens + np.array(label_nodes, np.int64),
        labels=np.array(labels, np.int64),
        label_weights=np.array(weights, np.float32),
    )


def _positions(num_query_tokens: int, parents: list[int]) -> np.ndarray:
    positions = np.arange(num_query_tokens + len(parents))
    for node, parent in enumerate(parents):
        positions[num_query_tokens + node] = positions[num_query_tokens + parent] + 1
    return positions


def _mask(num_query_tokens: int, parents: list[int]) -> np.ndarray:
    mask = np.tri(num_query_tokens + len(parents), dtype=bool)
    for node, parent in enumerate(parents, start=num_query_tokens):
        mask[node, num_query_tokens:] = mask[num_query_tokens + parent, num_query_tokens:]
        mask[node, node] = True
    return mask

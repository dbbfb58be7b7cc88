"""The questions on one image as a tree of tokens: what they have in common is there once, and is computed once.

The root is the image: its Q query tokens, one behind the other. Under it stand the texts, prompt and target, and
texts that begin alike share the nodes of their beginning: "Question:" always, often "what is the" too. A node sees the
image, the nodes on its way to the root, and itself; its position is the length of that way. So each text is computed
exactly as if it stood alone behind the image. The tree is a prefix tree over tokens; a tree with one text is a plain
sequence.

Q query tokens, T text nodes, S = Q + T nodes in all, L labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Tokens = Sequence[int] | np.ndarray


class PromptTarget(NamedTuple):
    """A prompt, and what is to be said to it."""

    prompt: Tokens
    target: Tokens
    weight: float = 1.0
    """Of the target's tokens in the loss."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The texts on one image, laid out for the language model."""

    input_ids: np.ndarray
    """(T,) int64: the text nodes, parents before children."""
    position_ids: np.ndarray
    """(S,) int64: of the query tokens and the text nodes."""
    mask: np.ndarray
    """(S, S) bool: whether node i sees node j."""
    label_nodes: np.ndarray
    """(L,) int64: the node, of all S, whose output is to be the label."""
    labels: np.ndarray
    """(L,) int64: token ids, the targets' tokens one after the other."""
    label_weights: np.ndarray
    """(L,) float32: how much each counts in the loss."""


def build_prefix_tree(query_tokens: int, texts: Sequence[PromptTarget]) -> PrefixTree:
    """The tree of some texts; a target's last token is only a label, since nothing follows it."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the texts' common parent is -1
    parents: list[int] = []
    labels: list[int] = []
    label_nodes: list[int] = []
    weights: list[float] = []
    for prompt, target, weight in texts:
        wanted = [int(token) for token in target]
        node = -1
        for place, token in enumerate([*(int(token) for token in prompt), *wanted[:-1]]):
            if place >= len(prompt):
                label_nodes.append(node)
            parent, node = node, nodes.setdefault((node, token), len(nodes))
            if node == len(parents):
                parents.append(parent)
        label_nodes += [node] * bool(wanted)
        labels += wanted
        weights += [weight] * len(wanted)
    return PrefixTree(
        input_ids=np.array([token for _, token in nodes], np.int64),
        position_ids=_positions(query_tokens, parents),
        mask=_mask(query_tokens, parents),
        label_nodes=query_tokens + np.array(label_nodes, np.int64),
        labels=np.array(labels, np.int64),
        label_weights=np.array(weights, np.float32),
    )


def _positions(query_tokens: int, parents: list[int]) -> np.ndarray:
    positions = np.arange(query_tokens + len(parents))
    for node, parent in enumerate(parents):
        positions[query_tokens + node] = positions[query_tokens + parent] + 1
    return positions


def _mask(query_tokens: int, parents: list[int]) -> np.ndarray:
    mask = np.tri(query_tokens + len(parents), dtype=bool)
    for node, parent in enumerate(parents, start=query_tokens):
        mask[node, query_tokens:] = mask[query_tokens + parent, query_tokens:]
        mask[node, node] = True
    return mask

"""The layout alone; that it computes what separate sequences compute is held by test_fidelity."""

import random

import numpy as np
import pytest

from pipeline.blip2.prefix_tree import PrefixTree, PromptTarget, build_prefix_tree

Q = 3


def way(tree: PrefixTree, node: int) -> list[int]:
    """Tokens on the way from the root to a text node, read off the mask."""
    seen = np.flatnonzero(tree.mask[node])
    assert list(seen[:Q]) == list(range(Q)), "the image is seen"
    assert seen[-1] == node
    return [int(tree.input_ids[one - Q]) for one in seen[Q:]]


def test_what_texts_have_in_common_is_there_once() -> None:
    tree = build_prefix_tree(
        Q, [PromptTarget([9, 1, 2], [5, 6]), PromptTarget([9, 1, 3], [7, 6], 0.5), PromptTarget([9, 1, 2], [8, 6])]
    )
    assert tree.input_ids.tolist() == [9, 1, 2, 5, 3, 7, 8]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 6]
    assert tree.labels.tolist() == [5, 6, 7, 6, 8, 6]
    assert tree.label_weights.tolist() == [1, 1, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_label_is_told_by_exactly_what_stands_before_it(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[9, *(rng.randrange(3) for _ in range(rng.randrange(1, 6)))] for _ in range(8)]
    targets = [[*(rng.randrange(3) for _ in range(rng.randrange(3))), 7] for _ in range(8)]
    tree = build_prefix_tree(Q, list(map(PromptTarget, prompts, targets)))
    before = [[*prompt, *target[:place]] for prompt, target in zip(prompts, targets, strict=True)
              for place in range(len(target))]  # fmt: skip
    assert [way(tree, node) for node in tree.label_nodes] == before
    assert tree.labels.tolist() == [token for target in targets for token in target]
    assert [tree.position_ids[node] for node in tree.label_nodes] == [Q + len(tokens) - 1 for tokens in before]
    assert len({tuple(way(tree, Q + node)) for node in range(len(tree.input_ids))}) == len(tree.input_ids)


def test_the_image_is_causal_and_sees_no_text() -> None:
    tree = build_prefix_tree(Q, [PromptTarget([9, 1], [5]), PromptTarget([9, 2], [5])])
    assert tree.mask[:Q].tolist() == np.tri(Q, Q + 3, dtype=bool).tolist()


def test_a_question_without_target_has_no_label() -> None:
    tree = build_prefix_tree(Q, [PromptTarget([9, 1], []), PromptTarget([9, 2], [5, 6])])
    assert tree.labels.tolist() == [5, 6]
    assert tree.input_ids.tolist() == [9, 1, 2, 5]

"""Structure of the prefix tree. That it computes the same as separate sequences is tested in test_fidelity."""

import random

import numpy as np
import pytest

from pipeline.blip2.prefix_tree import PrefixTree, PromptTarget, build_prefix_tree

Q = 3


def path_tokens(tree: PrefixTree, node: int) -> list[int]:
    """Tokens on the path from the root to a text node, read from the mask."""
    seen = np.flatnonzero(tree.mask[node])
    assert list(seen[:Q]) == list(range(Q)), "the node attends to the image"
    assert seen[-1] == node
    return [int(tree.input_ids[one - Q]) for one in seen[Q:]]


def test_shared_prefixes_are_stored_once() -> None:
    tree = build_prefix_tree(
        Q, [PromptTarget([9, 1, 2], [5, 6]), PromptTarget([9, 1, 3], [7, 6], 0.5), PromptTarget([9, 1, 2], [8, 6])]
    )
    assert tree.input_ids.tolist() == [9, 1, 2, 5, 3, 7, 8]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 6]
    assert tree.labels.tolist() == [5, 6, 7, 6, 8, 6]
    assert tree.label_weights.tolist() == [1, 1, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_label_is_predicted_from_exactly_its_prefix(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[9, *(rng.randrange(3) for _ in range(rng.randrange(1, 6)))] for _ in range(8)]
    targets = [[*(rng.randrange(3) for _ in range(rng.randrange(3))), 7] for _ in range(8)]
    tree = build_prefix_tree(Q, list(map(PromptTarget, prompts, targets)))
    before = [[*prompt, *target[:place]] for prompt, target in zip(prompts, targets, strict=True)
              for place in range(len(target))]  # fmt: skip
    assert [path_tokens(tree, node) for node in tree.label_nodes] == before
    assert tree.labels.tolist() == [token for target in targets for token in target]
    assert [tree.position_ids[node] for node in tree.label_nodes] == [Q + len(tokens) - 1 for tokens in before]
    assert len({tuple(path_tokens(tree, Q + node)) for node in range(len(tree.input_ids))}) == len(tree.input_ids)


def test_image_is_causal_and_does_not_attend_to_text() -> None:
    tree = build_prefix_tree(Q, [PromptTarget([9, 1], [5]), PromptTarget([9, 2], [5])])
    assert tree.mask[:Q].tolist() == np.tri(Q, Q + 3, dtype=bool).tolist()


def test_question_without_a_target_has_no_label() -> None:
    tree = build_prefix_tree(Q, [PromptTarget([9, 1], []), PromptTarget([9, 2], [5, 6])])
    assert tree.labels.tolist() == [5, 6]
    assert tree.input_ids.tolist() == [9, 1, 2, 5]

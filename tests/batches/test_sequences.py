"""Which questions share a sequence, and how sequences are grouped and packed."""

from itertools import chain

import numpy as np
import pytest
import torch

from pipeline.batches.sequences import (
    MAX_TOKENS_PER_BLOCK,
    ImageSequence,
    SequenceBuilder,
    micro_batches,
    pack,
    pack_prompts,
)
from pipeline.batches.split import open_split
from pipeline.batches.training import trainable_questions, training_batches
from pipeline.config import Config


@pytest.fixture(scope="module")
def builder(cached: Config) -> SequenceBuilder:
    """Three questions on each of 18 images."""
    return open_split(cached, "train")


def num_tokens(sequence: ImageSequence) -> int:
    return sequence.num_tokens


def test_questions_on_an_image_share_a_sequence(builder: SequenceBuilder) -> None:
    sequences = builder.for_training([0, 1, 2, 3])
    assert [sequence.num_questions for sequence in sequences] == [3, 1]
    separate = builder.for_training([0, 1, 2, 3], share_prefix=False)
    assert [sequence.num_questions for sequence in separate] == [1, 1, 1, 1]
    assert sequences[0].num_tokens < sum(map(num_tokens, separate[:3]))
    assert all(sequence.query_features.equal(sequences[0].query_features) for sequence in separate[:3])
    assert not sequences[1].query_features.equal(sequences[0].query_features)


def test_questions_of_an_image_are_collected_from_the_whole_batch(builder: SequenceBuilder) -> None:
    assert [sequence.num_questions for sequence in builder.for_training([0, 3, 1, 4, 2])] == [3, 2]


def test_sequence_has_a_maximum_number_of_questions(builder: SequenceBuilder) -> None:
    sequences = builder.for_training([0, 1, 2, 3, 4, 5], max_questions=2)
    assert [sequence.num_questions for sequence in sequences] == [2, 1, 2, 1]


def test_no_questions_give_one_sequence_without_labels(builder: SequenceBuilder) -> None:
    [sequence] = builder.for_training([])
    assert sequence.num_questions == 0
    assert len(sequence.tree.labels) == len(sequence.tree.label_nodes) == len(sequence.tree.label_weights) == 0
    assert sequence.num_tokens > builder.query_tokens


@pytest.mark.parametrize("max_tokens", [1, 60, 100, 10_000])
def test_micro_batches_keep_all_sequences_and_their_size(builder: SequenceBuilder, max_tokens: int) -> None:
    sequences = builder.for_training(range(54))
    groups = micro_batches(sequences, num_tokens, max_tokens)
    assert sorted(map(id, chain(*groups))) == sorted(map(id, sequences))
    assert all(len(group) == 1 or sum(map(num_tokens, group)) <= max_tokens for group in groups)
    assert len(groups) == {1: 18, 10_000: 1}.get(max_tokens, len(groups))


def test_pack_concatenates_sequences(builder: SequenceBuilder) -> None:
    sequences = builder.for_training(range(12))
    inputs = pack(sequences)
    total = sum(map(num_tokens, sequences))
    assert len(inputs["position_ids"]) == total == sum(map(len, inputs["block_masks"]))
    assert inputs["text_lengths"] == [num_tokens(sequence) - builder.query_tokens for sequence in sequences]
    assert sum(inputs["text_lengths"]) == len(inputs["input_ids"])
    start = 0
    for sequence in sequences:
        inside = (inputs["label_indices"] >= start) & (inputs["label_indices"] < start + sequence.num_tokens)
        assert inputs["labels"][inside].tolist() == sequence.tree.labels.tolist()
        start += sequence.num_tokens


def test_blocks_are_block_diagonal_and_bounded(builder: SequenceBuilder) -> None:
    sequences = builder.for_training(range(54))
    masks = pack(sequences)["block_masks"]
    assert all(len(mask) <= max(MAX_TOKENS_PER_BLOCK, *map(num_tokens, sequences)) for mask in masks)
    assert len(masks) < len(sequences), "small sequences share a block"
    whole = torch.block_diag(*(mask.int() for mask in masks))
    expected = torch.block_diag(*(torch.from_numpy(sequence.tree.mask).int() for sequence in sequences))
    assert whole.equal(expected)


def test_prompt_paths_are_the_prompts_behind_their_images(builder: SequenceBuilder) -> None:
    questions = [0, 1, 2, 3, 4]
    inputs = pack_prompts(builder.for_generation(questions))
    assert not any(name.startswith("label") for name in inputs)
    sequences = builder.for_generation(questions)
    tokens = np.concatenate([[*([-1] * builder.query_tokens), *one.tree.input_ids] for one in sequences])
    for row, question in enumerate(questions):
        path = inputs["paths"][row]
        seen = tokens[path[path >= 0]].tolist()
        prompt = builder.text.prompt_ids[question].tolist()
        assert seen == [-1] * builder.query_tokens + prompt[:-1]
        assert inputs["last_tokens"][row] == prompt[-1]


def test_training_batches_are_the_sequences_of_the_samplers_questions(builder: SequenceBuilder, cached: Config) -> None:
    questions = trainable_questions(builder, cached)
    batches = training_batches(cached, builder, questions)
    assert len(batches) == len(questions) == 54
    step = next(iter(batches.sampler))
    expected = builder.for_training(step)
    assert pack(batches.build(step))["input_ids"].equal(pack(expected)["input_ids"])
    first = list(batches.sampler)
    batches.set_epoch(1)
    assert list(batches.sampler) != first

"""The order of the questions: complete epochs, images kept together, and the parts of the ranks."""

from itertools import chain

import numpy as np
import pytest

from pipeline.batches.sampler import QuestionBatchSampler

IMAGE_ROW = np.repeat(np.arange(40), 5)
QUESTIONS = np.arange(200)


def test_epoch_has_every_question_once_and_keeps_images_together() -> None:
    sampler = QuestionBatchSampler(QUESTIONS, 16, seed=0, image_row=IMAGE_ROW)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert [len(batch) for batch in batches] == [16] * 12 + [8]
    order = list(chain(*batches))
    assert sorted(order) == QUESTIONS.tolist()
    rows = IMAGE_ROW[order]
    assert np.count_nonzero(np.diff(rows)) == 39, "the questions on an image are consecutive"
    assert rows.tolist() != sorted(rows.tolist())


def test_without_images_questions_are_shuffled_one_by_one() -> None:
    order = list(chain(*QuestionBatchSampler(QUESTIONS, 16, seed=0)))
    assert sorted(order) == QUESTIONS.tolist()
    assert np.count_nonzero(np.diff(IMAGE_ROW[order])) > 150


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler = QuestionBatchSampler(QUESTIONS, 16, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(QuestionBatchSampler(QUESTIONS, 16, seed=1)) != first


def test_only_the_given_questions_are_sampled() -> None:
    chosen = np.array([3, 4, 50, 51, 199])
    batches = list(QuestionBatchSampler(chosen, 2, seed=0, image_row=IMAGE_ROW))
    assert sorted(chain(*batches)) == chosen.tolist()
    assert len(batches) == 3


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_split_every_batch(world_size: int) -> None:
    parts = [list(QuestionBatchSampler(QUESTIONS, 16, 0, IMAGE_ROW, rank, world_size)) for rank in range(world_size)]
    joined = [list(chain(*batch)) for batch in zip(*parts, strict=True)]
    assert joined == list(QuestionBatchSampler(QUESTIONS, 16, 0, IMAGE_ROW))


def test_rank_without_questions_gets_an_empty_batch() -> None:
    parts = [list(QuestionBatchSampler(np.arange(2), 16, 0, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(len(batches[0]) for batches in parts) == [0, 1, 1]

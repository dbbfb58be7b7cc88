"""Sampler of the questions of each optimizer step."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class QuestionBatchSampler(Sampler[list[int]]):
    """Batches of question indices, in an order that depends on the seed and the epoch only.

    Args:
        questions: indices of the questions to sample.
        batch_size: questions per optimizer step, over all ranks.
        seed: seed of the order.
        image_row: image of each question. If given, images are shuffled and the questions on one image stay together
            as far as a batch has room; otherwise questions are shuffled.
        rank: rank whose part of each batch is returned. A part is empty if the batch has fewer questions than ranks.
        world_size: number of ranks.
    """

    def __init__(
        self,
        questions: np.ndarray,
        batch_size: int,
        seed: int,
        image_row: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.questions, self.batch_size, self.seed = questions, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._epoch = 0
        groups = np.arange(len(questions)) if image_row is None else image_row[questions]
        self._group = np.unique(groups, return_inverse=True)[1]  # of each question, counted from 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration returns."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.questions) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch."""
        place_of_group = np.random.default_rng([self.seed, self._epoch]).permutation(int(self._group.max()) + 1)
        order = self.questions[np.argsort(place_of_group[self._group], kind="stable")]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield np.array_split(batch, self.world_size)[self.rank].tolist()

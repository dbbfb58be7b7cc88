"""Which questions an optimizer step takes, and what of them each process."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class QuestionBatchSampler(Sampler[list[int]]):
    """The batches of an epoch: numbers of questions, in an order that the seed and the epoch alone decide.

    With `image_row` (of each question) the images are shuffled and the questions on one stay together, as far as a
    batch has room; without it the questions are shuffled. Each of several processes gets its share of every batch,
    which is empty where a batch has fewer questions than there are processes.
    """

    def __init__(
        self,
        questions: np.ndarray,
        batch_size: int,
        seed: int,
        image_row: np.ndarray | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.questions, self.batch_size, self.seed = questions, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch = 0
        """To be set before each epoch."""
        groups = np.arange(len(questions)) if image_row is None else image_row[questions]
        self._group = np.unique(groups, return_inverse=True)[1]  # of each question, counted from 0

    def __len__(self) -> int:
        return -(-len(self.questions) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        place = np.random.default_rng([self.seed, self.epoch]).permutation(int(self._group.max()) + 1)
        order = self.questions[np.argsort(place[self._group], kind="stable")]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield np.array_split(batch, self.processes)[self.process].tolist()

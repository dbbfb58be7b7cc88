"""Training batches: the questions of each optimizer step as sequences."""

import numpy as np
from torch.utils.data import Dataset

from pipeline.batches.sampler import QuestionBatchSampler
from pipeline.batches.sequences import MAX_QUESTIONS_PER_SEQUENCE, SequenceBatch, SequenceBuilder
from pipeline.batches.split import load_tokenizer
from pipeline.common.distributed import rank, world_size
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.data.sequence_length import check_lengths
from pipeline.data.targets import Targets


class TrainingBatches(Dataset[SequenceBatch]):
    """Trainable questions of a split, indexed by the lists of questions that `sampler` yields.

    Args:
        builder: builds the sequences.
        sampler: yields this rank's questions of each step.
        share_prefix: build one sequence per image instead of one per question.
        max_questions: bound of the questions in a sequence.
        targets: targets of a question in an epoch; None for the target in the text table.
    """

    def __init__(
        self,
        builder: SequenceBuilder,
        sampler: QuestionBatchSampler,
        share_prefix: bool = True,
        max_questions: int = MAX_QUESTIONS_PER_SEQUENCE,
        targets: Targets | None = None,
    ) -> None:
        self.sampler = sampler
        self._builder, self._targets = builder, targets
        self._share_prefix, self._max_questions = share_prefix, max_questions
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of the questions and the sampled targets."""
        self._epoch = epoch
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of trainable questions."""
        return len(self.sampler.questions)

    def __getitems__(self, questions: list[int]) -> SequenceBatch:
        """Return the sequences of some questions: the batched indexing of `torch.utils.data.DataLoader`."""
        return self.build(questions)

    def build(self, questions: list[int]) -> SequenceBatch:
        """Build the sequences of some questions."""
        targets = self._targets_of if self._targets else None
        return self._builder.for_training(questions, self._share_prefix, self._max_questions, targets)

    def _targets_of(self, question: int) -> list[tuple[np.ndarray, float]]:
        assert self._targets is not None
        return self._targets(question, self._epoch)


def trainable_questions(builder: SequenceBuilder, config: Config) -> np.ndarray:
    """Return the indices of the questions that have an answer.

    Raises:
        PipelineError: there are none.
    """
    questions = np.flatnonzero(np.diff(builder.text.target_ids.offsets))
    if len(questions) == 0:
        raise PipelineError(f"{config.cache.dir}: no question of the split train has an answer to train on")
    return questions


def training_batches(config: Config, builder: SequenceBuilder, questions: np.ndarray) -> TrainingBatches:
    """Return this rank's batches of `questions` according to the `train` section of `config`."""
    settings = config.train
    micro_batch = MAX_QUESTIONS_PER_SEQUENCE if settings.micro_batch == "auto" else settings.micro_batch
    image_row = builder.text.image_row if settings.share_prefix else None
    sampler = QuestionBatchSampler(questions, settings.batch_size, settings.seed, image_row, rank(), world_size())
    return TrainingBatches(
        builder,
        sampler,
        settings.share_prefix,
        min(micro_batch, MAX_QUESTIONS_PER_SEQUENCE),
        _targets(config, builder),
    )


def _targets(config: Config, builder: SequenceBuilder) -> Targets | None:
    """Return the targets, unless they are the most common answers, whose tokens are in the text table."""
    if config.training_answers == "most_common":
        return None
    tokenizer = load_tokenizer(config)
    targets = Targets(builder.text, tokenizer, config.training_answers, config.train.seed)
    check_lengths(builder.text, tokenizer, "train", targets.longest())
    return targets

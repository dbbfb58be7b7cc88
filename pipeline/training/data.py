"""Open the questions of a training and of its validation."""

from dataclasses import dataclass

import numpy as np

from pipeline.batches.sequences import SequenceBuilder
from pipeline.batches.split import load_tokenizer, open_split
from pipeline.batches.training import trainable_questions
from pipeline.config import Config
from pipeline.data.text import log_truncated_answers, truncated_answers
from pipeline.training.validation import Validator


@dataclass(frozen=True)
class TrainingData:
    """The questions of a training and of its validation."""

    builder: SequenceBuilder
    trainable: np.ndarray
    """Numbers of the questions that have an answer."""
    validator: Validator | None
    multiline_answers: int


def open_training_data(config: Config) -> TrainingData:
    """Open the splits for training and validation.

    Raises:
        PipelineError, CacheError: the cache does not match the config, or the validation cannot be scored.
    """
    builder = open_split(config, "train")
    tokenizer = load_tokenizer(config)
    validator = None
    if config.validation.steps is not None:
        validation_split = open_split(config, config.validation.split, builder.features, answered=True)
        validator = Validator(validation_split, tokenizer, config.validation, config.evaluate)
    multiline_answers = len(truncated_answers(builder.text, tokenizer))
    log_truncated_answers("train", multiline_answers, tokenizer)
    return TrainingData(builder, trainable_questions(builder, config), validator, multiline_answers)

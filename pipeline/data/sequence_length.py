"""Check that each question fits into the language model: image, prompt, and target or generated answer."""

from collections.abc import Sequence

import numpy as np

from cache.text import TextTable
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer

_MAX_TOKENS_PER_CHARACTER = 4  # the bytes of a character in UTF-8; a token of OPT has at least one byte


def is_evaluated(config: Config, split: str) -> bool:
    """Return whether validation or `pipe evaluate` may generate answers to the questions of this split."""
    return split != "train" or "train" in (config.evaluate.split, config.validation.steps and config.validation.split)


def too_long_reason(tokenizer: PromptTokenizer) -> str:
    """Return the reason of skipped questions that are too long."""
    return f"longer, with image and answer, than the language model's {tokenizer.max_length} tokens"


def find_too_long(
    examples: Sequence[VQAExample], text: TextTable, tokenizer: PromptTokenizer, config: Config, split: str
) -> list[int]:
    """Return the rows of the questions that are too long to be trained, or evaluated if the split is evaluated."""
    choice = config.training_answers if split == "train" else "most_common"
    answer_lengths = np.diff(text.target_ids.offsets)
    if choice != "most_common":
        answer_lengths = np.maximum(answer_lengths, _longest_targets(examples, text, tokenizer))
    if is_evaluated(config, split):
        answer_lengths = np.maximum(answer_lengths, config.evaluate.max_new_tokens)
    return np.flatnonzero(_lengths(text, tokenizer, answer_lengths) > tokenizer.max_length).tolist()


def check_lengths(text: TextTable, tokenizer: PromptTokenizer, split: str, targets: np.ndarray | None = None) -> None:
    """Raise `PipelineError` if a question is too long with its target.

    Args:
        text: the questions.
        tokenizer: their tokenizer.
        split: their split, for the message.
        targets: (n,) length of each one's longest target; None is that of the text.
    """
    answer_lengths = np.diff(text.target_ids.offsets) if targets is None else targets
    _check(text, tokenizer, answer_lengths, split, "its image and answer", "")


def check_answer_lengths(text: TextTable, tokenizer: PromptTokenizer, split: str, max_new_tokens: int) -> None:
    """Raise `PipelineError` if a question is too long with `max_new_tokens` generated tokens."""
    answer_lengths = np.full(len(text), max_new_tokens)
    what = f"its image and evaluate.max_new_tokens={max_new_tokens}"
    _check(text, tokenizer, answer_lengths, split, what, "Lower evaluate.max_new_tokens, or ")


def _check(
    text: TextTable, tokenizer: PromptTokenizer, answer_lengths: np.ndarray, split: str, what: str, instead: str
) -> None:
    lengths = _lengths(text, tokenizer, answer_lengths)
    count = int((lengths > tokenizer.max_length).sum())
    if not count:
        return
    longest = int(lengths.argmax())
    others = f", and {count - 1} more are too long" if count > 1 else ""
    advice = f"{instead}shorten such questions, or skip them with precompute.on_invalid=skip: in either case run "
    raise PipelineError(
        f"question {text.record(longest).get('question_id')!r} of {split} is {lengths[longest]} tokens long with "
        f"{what}; the language model has {tokenizer.max_length} positions{others}. {advice[0].upper()}{advice[1:]}"
        "`pipe precompute` again, with the overrides of this command"
    )


def _lengths(text: TextTable, tokenizer: PromptTokenizer, answer_lengths: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each sequence, image tokens included: (n,)."""
    lengths: np.ndarray = tokenizer.query_tokens + np.diff(text.prompt_ids.offsets) + answer_lengths
    return lengths


def _longest_targets(examples: Sequence[VQAExample], text: TextTable, tokenizer: PromptTokenizer) -> np.ndarray:
    """Return the number of tokens of each question's longest answer if it could be too long, else 0: (n,)."""
    room = (tokenizer.max_length - tokenizer.query_tokens - np.diff(text.prompt_ids.offsets)).tolist()
    suspects = {
        number: example.trainable_answers
        for number, example in enumerate(examples)
        if _MAX_TOKENS_PER_CHARACTER * max(map(len, example.answers), default=0) + 2 > room[number]
    }
    distinct = list({answer for answers in suspects.values() for answer in answers})
    length = {answer: len(ids) for answer, ids in zip(distinct, tokenizer.targets(distinct), strict=True)}
    longest = np.zeros(len(examples), np.int64)
    for number, answers in suspects.items():
        longest[number] = max((length[answer] for answer in answers), default=0)
    return longest

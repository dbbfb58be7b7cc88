"""Whether the language model has room for a question: its image, its prompt, and what is said behind them."""

from collections.abc import Sequence

import numpy as np

from cache.text import TextTable
from pipeline.common.errors import PipelineError
from pipeline.config import Config
from pipeline.data.examples import VQAExample
from pipeline.data.text import PromptTokenizer

_BYTES_OF_A_CHARACTER = 4  # in UTF-8, at most; a token of OPT is at least a byte


def is_answered(config: Config, split: str) -> bool:
    """Whether the model may be asked this split's questions, by validation or by `pipe evaluate`."""
    return split != "train" or "train" in (config.evaluate.split, config.validation.steps and config.validation.split)


def too_long_reason(tokenizer: PromptTokenizer) -> str:
    return f"longer, with image and answer, than the {tokenizer.max_length} tokens that the language model takes"


def find_too_long(
    examples: Sequence[VQAExample], text: TextTable, tokenizer: PromptTokenizer, config: Config, split: str
) -> list[int]:
    """Numbers of the questions that cannot be trained, or where the split is answered, cannot be answered."""
    choice = config.training_answers if split == "train" else "most_common"
    behind = np.diff(text.target_ids.offsets)
    if choice != "most_common":
        behind = np.maximum(behind, _longest_targets(examples, text, tokenizer))
    if is_answered(config, split):
        behind = np.maximum(behind, config.evaluate.max_new_tokens)
    return np.flatnonzero(_lengths(text, tokenizer, behind) > tokenizer.max_length).tolist()


def check_lengths(text: TextTable, tokenizer: PromptTokenizer, split: str, targets: np.ndarray | None = None) -> None:
    """Raises `PipelineError` if a question has no room for what it is trained to say.

    `targets`: (n,) tokens of the longest that each may be trained to say, if not the text's own.
    """
    behind = np.diff(text.target_ids.offsets) if targets is None else targets
    _check(text, tokenizer, behind, split, "its image and answer", "")


def check_answer_lengths(text: TextTable, tokenizer: PromptTokenizer, split: str, max_new_tokens: int) -> None:
    """Raises `PipelineError` if a question has no room for an answer."""
    behind = np.full(len(text), max_new_tokens)
    what = f"its image and evaluate.max_new_tokens={max_new_tokens}"
    _check(text, tokenizer, behind, split, what, "Lower evaluate.max_new_tokens, or ")


def _check(
    text: TextTable, tokenizer: PromptTokenizer, behind: np.ndarray, split: str, what: str, instead: str
) -> None:
    lengths = _lengths(text, tokenizer, behind)
    count = int((lengths > tokenizer.max_length).sum())
    if not count:
        return
    longest = int(lengths.argmax())
    others = f", and {count - 1} more are too long" if count > 1 else ""
    advice = f"{instead}shorten such questions, or skip them with precompute.on_invalid=skip: in either case run "
    raise PipelineError(
        f"question {text.record(longest).get('question_id')!r} of {split} is {lengths[longest]} tokens long with "
        f"{what}; the language model takes {tokenizer.max_length}{others}. {advice[0].upper()}{advice[1:]}"
        "`pipe precompute` again, with the overrides of this command"
    )


def _lengths(text: TextTable, tokenizer: PromptTokenizer, behind: np.ndarray) -> np.ndarray:
    """(n,) tokens, the image's included."""
    lengths: np.ndarray = tokenizer.query_tokens + np.diff(text.prompt_ids.offsets) + behind
    return lengths


def _longest_targets(examples: Sequence[VQAExample], text: TextTable, tokenizer: PromptTokenizer) -> np.ndarray:
    """(n,) tokens of each question's longest answer, where it could be too long; else 0."""
    room = (tokenizer.max_length - tokenizer.query_tokens - np.diff(text.prompt_ids.offsets)).tolist()
    suspects = {
        number: example.trainable_answers
        for number, example in enumerate(examples)
        if _BYTES_OF_A_CHARACTER * max(map(len, example.answers), default=0) + 2 > room[number]
    }
    distinct = list({answer for answers in suspects.values() for answer in answers})
    length = {answer: len(ids) for answer, ids in zip(distinct, tokenizer.targets(distinct), strict=True)}
    longest = np.zeros(len(examples), np.int64)
    for number, answers in suspects.items():
        longest[number] = max((length[answer] for answer in answers), default=0)
    return longest

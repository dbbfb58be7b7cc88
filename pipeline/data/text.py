"""Tokenize questions and answers: prompts and targets, the token rows of a `TextTable`."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cache.text import Ragged, TextTable
from pipeline.blip2.checkpoint_check import check_config, end_tokens
from pipeline.common.errors import PipelineError
from pipeline.common.library_errors import one_line
from pipeline.common.progress import log_info, progress_bar, with_bar
from pipeline.data.cached_examples import CachedExamples
from pipeline.data.examples import BYTE_ORDER_MARK, VQAExample, is_blank

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CHUNK_SIZE = 10_000
"""Texts tokenized at a time."""
RULES = 3
"""Version of the tokenization in this module. A change invalidates the tokens of every cache."""

_to_json = json.JSONEncoder(ensure_ascii=False).encode


class PromptTokenizer:
    """Tokenizer of a checkpoint with an OPT language model.

    A prompt is BOS and the filled template. A target is a space, the answer and the end token, which is a newline in
    BLIP-2's OPT checkpoints. Only targets are trained. An answer is cut at the text of the end token, since the model
    cannot generate anything after it. Special tokens in a text (`<image>`, `</s>`) are tokenized as plain text.
    """

    def __init__(self, checkpoint_folder: Path, prompt: str):
        """Load the tokenizer.

        Args:
            checkpoint_folder: the checkpoint.
            prompt: template, in which `{question}` is replaced.

        Raises:
            PipelineError: the tokenizer is missing, damaged, or does not match the language model.
        """
        config = check_config(checkpoint_folder)
        text_config = config.text_config
        self.tokenizer = load_tokenizer_files(checkpoint_folder)
        max_id = max(self.tokenizer.get_vocab().values(), default=-1)
        if max_id >= text_config.vocab_size:
            raise PipelineError(
                f"{checkpoint_folder}: the tokenizer has {max_id + 1} tokens, "
                f"the language model {text_config.vocab_size}; they belong to different checkpoints"
            )
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # as plain text; transformers calls this split_special_tokens
        self.prompt = prompt
        self.bos_token_id: int = text_config.bos_token_id
        self.eos_token_id: int = end_tokens(config)[0]
        self.query_tokens: int = config.num_query_tokens
        self.max_length: int = text_config.max_position_embeddings
        """Positions of the language model, for image and text."""
        is_special = self.eos_token_id in self.tokenizer.all_special_ids
        self.end_text: str = "" if is_special else str(self.tokenizer.decode([self.eos_token_id]))
        """Text of the end token; empty if it is a special token."""

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the tokenizer, the special tokens in use, and `RULES`."""
        backend = self._backend.to_str()
        return hashlib.sha256(f"{backend} {self.bos_token_id} {self.eos_token_id} {RULES}".encode()).hexdigest()

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each question's prompt."""
        filled = [self.prompt.replace("{question}", question.replace(BYTE_ORDER_MARK, "")) for question in questions]
        return [[self.bos_token_id, *ids] for ids in self._encode(filled)]

    def targets(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each answer's target."""
        return [
            [*ids, self.eos_token_id] for ids in self._encode([f" {self.trainable_text(answer)}" for answer in answers])
        ]

    def trainable_text(self, answer: str) -> str:
        """Return the part of an answer that can be trained: the first non-blank one between end tokens."""
        answer = answer.strip()
        if not self.end_text or self.end_text not in answer:
            return answer
        return next((part for part in map(str.strip, answer.split(self.end_text)) if not is_blank(part)), "")

    def is_truncated(self, answer: str) -> bool:
        """Return whether an answer has more text than can be trained."""
        return self.trainable_text(answer) != answer.strip()

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the answers in rows of generated tokens."""
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        distinct = list(dict.fromkeys(texts))
        ids: dict[str, list[int]] = {}
        with progress_bar("tokens", len(distinct), "texts", delay=2) as bar:
            for start in range(0, len(distinct), CHUNK_SIZE):
                some = distinct[start : start + CHUNK_SIZE]
                # The tokenizer's own __call__ warns about long texts, and processes each row in Python.
                try:
                    encoded = self._backend.encode_batch_fast(some, add_special_tokens=False)
                except TypeError:  # half of a surrogate pair, as from a command line in another encoding
                    raise PipelineError("a question or an answer is not valid UTF-8") from None
                ids.update(zip(some, (one.ids for one in encoded), strict=True))
                bar.update(len(some))
        return [ids[text] for text in texts]


def load_tokenizer_files(checkpoint_folder: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer. Raises `PipelineError` if its files are missing or damaged."""
    if not any(all((checkpoint_folder / name).is_file() for name in files) for files in VOCABULARIES):
        wanted = " or ".join(" with ".join(files) for files in VOCABULARIES)
        raise PipelineError(f"{checkpoint_folder}: the checkpoint has no tokenizer ({wanted})")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint_folder)
        tokenizer.backend_tokenizer.encode("a")
    except Exception as error:  # the type depends on the damage and on the release of the library
        raise PipelineError(
            f"{checkpoint_folder}: its tokenizer ({', '.join(_tokenizer_files(checkpoint_folder))}) cannot be loaded: "
            f"{one_line(error)}. Download the checkpoint again"
        ) from None
    return tokenizer


def _tokenizer_files(folder: Path) -> list[str]:
    names = (*chain(*VOCABULARIES), "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if (folder / name).exists()]


def retokenize(text: TextTable, tokenizer: PromptTokenizer) -> TextTable:
    """Return the same questions, tokenized with another prompt or tokenizer."""
    examples = [VQAExample.from_record(text.record(i)) for i in with_bar("questions", range(len(text)), "questions")]
    prompt_ids, target_ids = _token_rows(examples, tokenizer)
    fingerprint = tokenizer.fingerprint()
    return replace(text, prompt_ids=prompt_ids, target_ids=target_ids, prompt=tokenizer.prompt, tokenizer=fingerprint)


def tokenize(
    examples: Sequence[VQAExample],
    image_rows: Sequence[int] | np.ndarray,
    tokenizer: PromptTokenizer,
    earlier: TextTable | None = None,
) -> TextTable:
    """Return the text of one split; an example without an answer has an empty target.

    Args:
        examples: the questions.
        image_rows: (n,) cache row of each one's image.
        tokenizer: the tokenizer.
        earlier: text of an earlier run. Tokens of its records are reused if prompt and tokenizer are the same.
    """
    records = _records(examples)
    rows = np.full(len(examples), -1)
    if earlier is not None and (earlier.prompt, earlier.tokenizer) == (tokenizer.prompt, tokenizer.fingerprint()):
        rows = _rows_in(earlier.records, records)
    prompt_ids, target_ids = _token_rows([examples[row] for row in np.flatnonzero(rows < 0).tolist()], tokenizer)
    if earlier is not None and (rows >= 0).any():
        prompt_ids = _merge(earlier.prompt_ids, rows, prompt_ids)
        target_ids = _merge(earlier.target_ids, rows, target_ids)
    return TextTable(
        records=records,
        image_row=np.asarray(image_rows, np.int64),
        prompt_ids=prompt_ids,
        target_ids=target_ids,
        prompt=tokenizer.prompt,
        tokenizer=tokenizer.fingerprint(),
    )


def select(text: TextTable, rows: np.ndarray) -> TextTable:
    """Return a subset of the questions, by row."""
    return replace(
        text,
        records=text.records.take(rows),
        image_row=text.image_row[rows],
        prompt_ids=text.prompt_ids.take(rows),
        target_ids=text.target_ids.take(rows),
    )


def truncated_answers(text: TextTable, tokenizer: PromptTokenizer) -> dict[int, int]:
    """Return the number of truncated answers of each question that has any, by row."""
    if not tokenizer.end_text:
        return {}
    data, offsets = text.records.values.tobytes(), text.records.offsets
    found: dict[int, int] = {}
    for number in _rows_with(_to_json(tokenizer.end_text)[1:-1].encode(), data, offsets):
        answers = VQAExample.from_record(text.record(number)).answers
        if count := sum(map(tokenizer.is_truncated, answers)):
            found[number] = count
    return found


def log_truncated_answers(split: str, questions: int, tokenizer: PromptTokenizer) -> None:
    """Log the number of questions of a split with truncated answers, if there are any."""
    if questions:
        log_info(
            f"{split}: {questions} questions have answers of several lines. The model ends an answer with "
            f"{json.dumps(tokenizer.end_text)}, so only the first non-blank line is trained"
        )


def _token_rows(examples: Sequence[VQAExample], tokenizer: PromptTokenizer) -> tuple[Ragged, Ragged]:
    """Return the prompts, and the targets, empty if there is no answer."""
    answered = iter(tokenizer.targets([example.target for example in examples if example.answers]))
    prompts = tokenizer.prompts([example.question for example in examples])
    targets = [next(answered) if example.answers else [] for example in examples]
    return Ragged.from_rows(prompts, np.int32), Ragged.from_rows(targets, np.int32)


def _records(examples: Sequence[VQAExample]) -> Ragged:
    if isinstance(examples, CachedExamples):
        return examples.text.records
    listed = with_bar("questions", examples, "questions")
    # A file name that is not UTF-8 contains halves of surrogate pairs, which JSON can escape.
    rows = [_to_json(example.to_record()).encode("utf-8", "backslashreplace") for example in listed]
    return Ragged.from_rows(rows, np.uint8)


def _rows_with(pattern: bytes, data: bytes, offsets: np.ndarray) -> Iterable[int]:
    position = data.find(pattern)
    while position >= 0:
        row = bisect_right(offsets, position) - 1
        yield row
        position = data.find(pattern, int(offsets[row + 1]))


def _rows_in(known: Ragged, wanted: Ragged) -> np.ndarray:
    """Return for each of `wanted` the row of `known` with the same bytes, or -1: (n,)."""
    if np.array_equal(known.offsets, wanted.offsets) and np.array_equal(known.values, wanted.values):
        return np.arange(len(wanted))
    row_of = {known[row].tobytes(): row for row in range(len(known))}
    return np.array([row_of.get(wanted[row].tobytes(), -1) for row in range(len(wanted))], np.int64)


def _merge(known: Ragged, rows: np.ndarray, new: Ragged) -> Ragged:
    """Return the rows `rows` of `known`; each -1 stands for the next row of `new`."""
    if len(new) == 0 and np.array_equal(rows, np.arange(len(known))):
        return known
    values = np.concatenate([known.values, new.values])
    both = Ragged(values, np.concatenate([known.offsets, new.offsets[1:] + known.offsets[-1]]))
    return both.take(np.where(rows < 0, len(known) + np.cumsum(rows < 0) - 1, rows))

"""Prompt, tokens and label mask: questions and answers -> the token rows of a `TextTable`."""

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
TOKENISED_AT_ONCE = 10_000  # texts
RULES = 3
"""How texts become tokens here. A change of it makes the tokens of every cache anew."""

_to_json = json.JSONEncoder(ensure_ascii=False).encode


class PromptTokenizer:
    """A checkpoint's tokenizer with OPT's habits: BOS before the text, the end token after the answer.

    A prompt is BOS and the filled-in template. A target is a space, the answer and the end token ("\\n" in
    BLIP-2's OPT checkpoints): what the model is trained to say, and nothing else is. An answer ends where the end
    token's text stands in it, since nothing behind that can ever be said. Special tokens that a text spells
    (`<image>`, `</s>`) are text.
    """

    def __init__(self, checkpoint_folder: Path, prompt: str):
        config = check_config(checkpoint_folder)
        text_config = config.text_config
        self.tokenizer = load_tokenizer_files(checkpoint_folder)
        most = max(self.tokenizer.get_vocab().values(), default=-1)
        if most >= text_config.vocab_size:
            raise PipelineError(
                f"{checkpoint_folder}: the tokenizer has {most + 1} tokens, "
                f"the language model {text_config.vocab_size}; they are not of one checkpoint"
            )
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # as text, that is: the library's word for split_special_tokens
        self.prompt = prompt
        self.bos_token_id: int = text_config.bos_token_id
        self.eos_token_id: int = end_tokens(config)[0]
        self.query_tokens: int = config.num_query_tokens
        self.max_length: int = text_config.max_position_embeddings
        """Positions that the language model has, for the image and the text."""
        is_special = self.eos_token_id in self.tokenizer.all_special_ids
        self.end_text: str = "" if is_special else str(self.tokenizer.decode([self.eos_token_id]))
        """The end token's text; empty if no text can spell it."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer, of the special tokens used, and of `RULES`."""
        backend = self._backend.to_str()
        return hashlib.sha256(f"{backend} {self.bos_token_id} {self.eos_token_id} {RULES}".encode()).hexdigest()

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        filled = [self.prompt.replace("{question}", question.replace(BYTE_ORDER_MARK, "")) for question in questions]
        return [[self.bos_token_id, *ids] for ids in self._encode(filled)]

    def targets(self, answers: Sequence[str]) -> list[list[int]]:
        return [
            [*ids, self.eos_token_id] for ids in self._encode([f" {self.trainable_text(answer)}" for answer in answers])
        ]

    def trainable_text(self, answer: str) -> str:
        """What of an answer the model can say: the first part that the end token leaves, and is not blank."""
        answer = answer.strip()
        if not self.end_text or self.end_text not in answer:
            return answer
        return next((part for part in map(str.strip, answer.split(self.end_text)) if not is_blank(part)), "")

    def is_truncated(self, answer: str) -> bool:
        """Whether there is more in an answer than can be said."""
        return self.trainable_text(answer) != answer.strip()

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The answers that rows of generated tokens spell."""
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        distinct = list(dict.fromkeys(texts))
        ids: dict[str, list[int]] = {}
        with progress_bar("tokens", len(distinct), "texts", delay=2) as bar:
            for start in range(0, len(distinct), TOKENISED_AT_ONCE):
                some = distinct[start : start + TOKENISED_AT_ONCE]
                # Not the tokenizer's own call: it warns of long texts, and puts each row through Python.
                try:
                    encoded = self._backend.encode_batch_fast(some, add_special_tokens=False)
                except TypeError:  # half of a surrogate pair, as bytes of another encoding on a command line become
                    raise PipelineError("a question or an answer is not text: its bytes are not UTF-8") from None
                ids.update(zip(some, (one.ids for one in encoded), strict=True))
                bar.update(len(some))
        return [ids[text] for text in texts]


def load_tokenizer_files(checkpoint_folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises `PipelineError` if its files are missing or damaged."""
    if not any(all((checkpoint_folder / name).is_file() for name in files) for files in VOCABULARIES):
        wanted = " or ".join(" with ".join(files) for files in VOCABULARIES)
        raise PipelineError(f"{checkpoint_folder}: the checkpoint has no tokenizer ({wanted})")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint_folder)
        tokenizer.backend_tokenizer.encode("a")
    except Exception as error:  # of a damaged file each release of the library raises something else
        raise PipelineError(
            f"{checkpoint_folder}: its tokenizer ({', '.join(_tokenizer_files(checkpoint_folder))}) cannot be loaded: "
            f"{one_line(error)}; get the checkpoint again"
        ) from None
    return tokenizer


def _tokenizer_files(folder: Path) -> list[str]:
    names = (*chain(*VOCABULARIES), "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if (folder / name).exists()]


def retokenize(text: TextTable, tokenizer: PromptTokenizer) -> TextTable:
    """The same questions under another prompt or tokenizer."""
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
    """The text of one split; an example without an answer gets an empty target.

    Of questions whose records are in `earlier`, with its prompt and tokenizer, the tokens are taken from there.
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
    """Some of the questions, by their numbers."""
    return replace(
        text,
        records=text.records.take(rows),
        image_row=text.image_row[rows],
        prompt_ids=text.prompt_ids.take(rows),
        target_ids=text.target_ids.take(rows),
    )


def truncated_answers(text: TextTable, tokenizer: PromptTokenizer) -> dict[int, int]:
    """Numbers of the questions that have answers of which only a part can be said -> how many of them."""
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
    if questions:
        log_info(
            f"{split}: {questions} questions have answers of several lines. The model ends an answer with "
            f"{json.dumps(tokenizer.end_text)}, so only the first line that is not blank is trained"
        )


def _token_rows(examples: Sequence[VQAExample], tokenizer: PromptTokenizer) -> tuple[Ragged, Ragged]:
    """Prompts, and targets, empty where there is no answer."""
    answered = iter(tokenizer.targets([example.target for example in examples if example.answers]))
    prompts = tokenizer.prompts([example.question for example in examples])
    targets = [next(answered) if example.answers else [] for example in examples]
    return Ragged.from_rows(prompts, np.int32), Ragged.from_rows(targets, np.int32)


def _records(examples: Sequence[VQAExample]) -> Ragged:
    if isinstance(examples, CachedExamples):
        return examples.text.records
    listed = with_bar("questions", examples, "questions")
    # A file's name that is no UTF-8 holds halves of surrogate pairs, which JSON can escape.
    rows = [_to_json(example.to_record()).encode("utf-8", "backslashreplace") for example in listed]
    return Ragged.from_rows(rows, np.uint8)


def _rows_with(sought: bytes, data: bytes, offsets: np.ndarray) -> Iterable[int]:
    place = data.find(sought)
    while place >= 0:
        row = bisect_right(offsets, place) - 1
        yield row
        place = data.find(sought, int(offsets[row + 1]))


def _rows_in(known: Ragged, wanted: Ragged) -> np.ndarray:
    """(n,) for each of `wanted` the row of `known` that has the same bytes, or -1."""
    if np.array_equal(known.offsets, wanted.offsets) and np.array_equal(known.values, wanted.values):
        return np.arange(len(wanted))
    place = {known[row].tobytes(): row for row in range(len(known))}
    return np.array([place.get(wanted[row].tobytes(), -1) for row in range(len(wanted))], np.int64)


def _merge(known: Ragged, rows: np.ndarray, new: Ragged) -> Ragged:
    """Rows `rows` of `known`, and where one is -1 the next of `new`."""
    if len(new) == 0 and np.array_equal(rows, np.arange(len(known))):
        return known
    values = np.concatenate([known.values, new.values])
    both = Ragged(values, np.concatenate([known.offsets, new.offsets[1:] + known.offsets[-1]]))
    return both.take(np.where(rows < 0, len(known) + np.cumsum(rows < 0) - 1, rows))

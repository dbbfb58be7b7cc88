"""Prompt, tokens and label mask: questions and answers -> the token rows of a `TextTable`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cache.text import Ragged, TextTable
from pipeline.checkpoint_check import check_config, end_tokens
from pipeline.errors import PipelineError
from pipeline.examples import VQAExample
from pipeline.faults import one_line

VOCABULARIES = ("tokenizer.json", "vocab.json")
TOKENISED_AT_ONCE = 10_000  # questions


class PromptTokenizer:
    """A checkpoint's tokenizer with OPT's habits: BOS before the text, the end token after the answer.

    A prompt is BOS and the filled-in template. A target is a space, the answer and the end token ("\\n" in
    BLIP-2's OPT checkpoints): what the model is trained to say, and nothing else is.
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
        self.prompt = prompt
        self.bos_token_id: int = text_config.bos_token_id
        self.eos_token_id: int = end_tokens(config)[0]
        self.query_tokens: int = config.num_query_tokens
        self.longest: int = text_config.max_position_embeddings
        """Positions that the language model has, for the image and the text."""

    def identity(self) -> str:
        """SHA-256 (hex) of the tokenizer and of the special tokens used."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{backend} {self.bos_token_id} {self.eos_token_id}".encode()).hexdigest()

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        filled = [self.prompt.replace("{question}", question) for question in questions]
        return [[self.bos_token_id, *ids] for ids in self._encode(filled)]

    def targets(self, answers: Sequence[str]) -> list[list[int]]:
        return [[*ids, self.eos_token_id] for ids in self._encode([f" {answer.strip()}" for answer in answers])]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The answers that rows of generated tokens spell."""
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def load_tokenizer_files(checkpoint_folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises `PipelineError` if its files are missing or damaged."""
    if not any((checkpoint_folder / name).exists() for name in VOCABULARIES):
        raise PipelineError(f"{checkpoint_folder}: the checkpoint has no tokenizer ({' or '.join(VOCABULARIES)})")
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
    names = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if (folder / name).exists()]


def retokenize(text: TextTable, tokenizer: PromptTokenizer) -> TextTable:
    """The same questions under another prompt or tokenizer."""
    examples = [VQAExample.from_record(text.record(i)) for i in range(len(text))]
    return tokenize(examples, text.image_row, tokenizer)


def tokenize(
    examples: Sequence[VQAExample], image_rows: Sequence[int] | np.ndarray, tokenizer: PromptTokenizer
) -> TextTable:
    """The text of one split; an example without an answer gets an empty target."""
    prompts: list[list[int]] = []
    targets: list[list[int]] = []
    for start in range(0, len(examples), TOKENISED_AT_ONCE):
        part = examples[start : start + TOKENISED_AT_ONCE]
        prompts += tokenizer.prompts([example.question for example in part])
        spelled = iter(tokenizer.targets([example.target for example in part if example.answers]))
        targets += [next(spelled) if example.answers else [] for example in part]
    records = [
        json.dumps(example.to_record(), ensure_ascii=False).encode("utf-8", "backslashreplace") for example in examples
    ]
    return TextTable(
        records=Ragged.from_rows(records, np.uint8),
        image_row=np.asarray(image_rows, np.int64),
        prompt_ids=Ragged.from_rows(prompts, np.int32),
        target_ids=Ragged.from_rows(targets, np.int32),
        prompt=tokenizer.prompt,
        tokenizer=tokenizer.identity(),
    )

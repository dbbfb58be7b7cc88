"""A cached split as a `torch.utils.data.Dataset`, for training loops outside this pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cache.reader import FeatureReader
from pipeline.batches.sequences import gather_features

IGNORE_INDEX = -100
"""Label of positions that do not count in the loss."""


class CachedVQADataset(Dataset[dict[str, Any]]):
    """Questions of one split of a cache, with the query features of their images.

    An item is one question:
        query_features: (Q, D), in the dtype of the cache.
        input_ids: (Q + T,) int64: Q times `image_token_id`, then the prompt and its target.
        labels: (Q + T,) int64: the target tokens, and -100 at all positions of the image and the prompt.
        question_id: id in the data set.

    The cache is used as it is: unlike `pipe train`, the dataset does not compare it with a config. Workers of a
    `DataLoader` may be forked or spawned.

    Args:
        cache: folder of a complete cache.
        split: name of the split.
        image_token_id: token at the positions of the image, `model.config.image_token_id`.
        trainable_only: skip questions without an answer.
        pad_token_id: token at the positions that `collate` adds, which are masked.

    Raises:
        CacheError: there is no complete cache, or no such split in it.
    """

    def __init__(
        self,
        cache: str | Path,
        split: str,
        image_token_id: int,
        trainable_only: bool = True,
        pad_token_id: int = 1,
    ) -> None:
        self.features = FeatureReader(Path(cache))
        self.text = self.features.text(split)
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        has_target = np.diff(self.text.target_ids.offsets) > 0
        self.questions = np.flatnonzero(has_target) if trainable_only else np.arange(len(self.text))
        """Indices, in the split, of the questions of this dataset."""

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one question."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several questions, reading each image once. `DataLoader` calls it with the indices of a batch."""
        questions = self.questions[np.asarray(indices, np.int64)]
        rows, row_of_question = np.unique(self.text.image_row[questions], return_inverse=True)
        features = gather_features(self.features, rows)
        return [
            {**self._tokens(int(question)), "query_features": features[row]}
            for question, row in zip(questions, row_of_question, strict=True)
        ]

    def _tokens(self, question: int) -> dict[str, Any]:
        num_query_tokens = self.features.spec.query_tokens
        prompt, target = self.text.prompt_ids[question], self.text.target_ids[question]
        image = np.full(num_query_tokens, self.image_token_id)
        ignored = np.full(num_query_tokens + len(prompt), IGNORE_INDEX)
        return {
            "input_ids": torch.from_numpy(np.concatenate([image, prompt, target])),
            "labels": torch.from_numpy(np.concatenate([ignored, target])),
            "question_id": self.text.record(question)["question_id"],
        }

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack items into a batch, right-padded, with an `attention_mask`: the `collate_fn` of a `DataLoader`."""
        input_ids = [item["input_ids"] for item in items]
        masks = [torch.ones_like(tokens) for tokens in input_ids]
        return {
            "query_features": torch.stack([item["query_features"] for item in items]),
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX),
            "question_id": [item["question_id"] for item in items],
        }


def language_model_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of `model.language_model` for a batch of `CachedVQADataset.collate`.

    Args:
        model: transformers' `Blip2ForConditionalGeneration`, or a `PeftModel` around it.
        batch: moved to the device of the model if it is elsewhere.
    """
    embedding, projection = model.get_input_embeddings(), model.language_projection
    device, dtype = projection.weight.device, projection.weight.dtype
    images = projection(batch["query_features"].to(device, dtype))
    texts = embedding(batch["input_ids"][:, images.shape[1] :].to(device))
    return {
        "inputs_embeds": torch.cat([images.to(texts.dtype), texts], dim=1),
        "attention_mask": batch["attention_mask"].to(device),
        "labels": batch["labels"].to(device),
    }

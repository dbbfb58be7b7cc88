"""A cached split as a torch dataset: its items, its workers, and that plain transformers trains on it."""

import inspect
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from peft import LoraConfig, get_peft_model
from plain_model import load_full, make_lora_nonzero, trainable
from rounding import relative_difference
from torch.utils.data import DataLoader, Subset
from transformers import Blip2ForConditionalGeneration
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from cache.reader import FeatureReader
from cache.spec import CacheError
from pipeline.batches.sequences import pack
from pipeline.batches.split import open_split
from pipeline.batches.torch_dataset import IGNORE_INDEX, CachedVQADataset, language_model_inputs
from pipeline.blip2.base_model import load_base
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.blip2.language_model import add_lora
from pipeline.config import Config

IMAGE_TOKEN = 538
LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def dataset(cached: Config) -> CachedVQADataset:
    return CachedVQADataset(cached.cache.dir, "train", IMAGE_TOKEN)


def test_item_has_features_tokens_and_labels_of_the_target_only(dataset: CachedVQADataset, cached: Config) -> None:
    features = FeatureReader(cached.cache.dir)
    text = features.text("train")
    assert len(dataset) == len(text)
    for index in (0, 7, len(text) - 1):
        item = dataset[index]
        prompt, target = text.prompt_ids[index].tolist(), text.target_ids[index].tolist()
        num_query_tokens = features.spec.query_tokens
        assert item["input_ids"].tolist() == [IMAGE_TOKEN] * num_query_tokens + prompt + target
        assert item["labels"].tolist() == [IGNORE_INDEX] * (num_query_tokens + len(prompt)) + target
        assert item["query_features"].numpy().tolist() == features.gather(text.image_row[[index]])[0].tolist()
        assert item["question_id"] == text.record(index)["question_id"]


def test_questions_without_an_answer_are_skipped_by_default(cached: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FeatureReader(cached.cache.dir).text("train")
    offsets = text.target_ids.offsets.copy()
    offsets[3:] = np.maximum(offsets[3:] - (offsets[3] - offsets[2]), 0)
    target_ids = type(text.target_ids)(text.target_ids.values[: offsets[-1]], offsets)
    monkeypatch.setattr(FeatureReader, "text", lambda *_: type(text)(**{**vars(text), "target_ids": target_ids}))
    trainable_questions = CachedVQADataset(cached.cache.dir, "train", IMAGE_TOKEN)
    assert trainable_questions.questions.tolist() == [index for index in range(len(text)) if index != 2]
    everything = CachedVQADataset(cached.cache.dir, "train", IMAGE_TOKEN, trainable_only=False)
    assert len(everything) == len(text)
    assert (everything[2]["labels"] == IGNORE_INDEX).all()


def test_batch_is_right_padded_and_masked(dataset: CachedVQADataset) -> None:
    items = [dataset[index] for index in range(3)]
    items[1] |= {name: items[1][name][:-1] for name in ("input_ids", "labels")}  # all have the same length
    batch = dataset.collate(items)
    longest = max(len(item["input_ids"]) for item in items)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert batch["input_ids"][row, :length].equal(item["input_ids"])
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["query_features"][row].equal(item["query_features"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_return_the_same_batches(dataset: CachedVQADataset, method: str) -> None:
    dataset[0]  # opened before the workers start
    settings: dict[str, Any] = {"batch_size": 16, "collate_fn": dataset.collate}
    expected = list(DataLoader(dataset, **settings))
    batches = list(DataLoader(dataset, **settings, num_workers=2, multiprocessing_context=method))
    assert len(batches) == len(expected) > 2
    for batch, alone in zip(batches, expected, strict=True):
        assert batch["question_id"] == alone["question_id"]
        assert all(batch[name].equal(alone[name]) for name in alone if name != "question_id")


def test_unknown_split_is_an_error_that_lists_the_splits(cached: Config) -> None:
    with pytest.raises(CacheError, match="train, val"):
        CachedVQADataset(cached.cache.dir, "test", IMAGE_TOKEN)


def plain_lora() -> Any:
    model = load_full(embedded_checkpoint(), bits=None)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])).train()


def test_two_plain_steps_equal_the_pipelines(dataset: CachedVQADataset, cached: Config) -> None:
    """The losses, and the weights after two steps of SGD."""
    plain = plain_lora()
    config = cached.model_copy(update={"quantization": cached.quantization.model_copy(update={"bits": None})})
    ours = add_lora(load_base(config), 16, 32, 0.0, ("q_proj", "v_proj"), "none").train()
    make_lora_nonzero(plain)
    make_lora_nonzero(ours)
    builder = open_split(config, "train")
    optimizers = [torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE) for model in (plain, ours)]
    loader = DataLoader(Subset(dataset, range(12)), batch_size=6, collate_fn=dataset.collate)
    losses = []
    for start, batch in zip((0, 6), loader, strict=True):
        plain_loss = plain.language_model(**language_model_inputs(plain, batch)).loss
        our_loss = ours(**pack(builder.for_training(range(start, start + 6)))).loss
        assert plain_loss.item() == pytest.approx(our_loss.item(), rel=rounding.FLOAT32)
        losses.append(plain_loss.item())
        for loss, optimizer in zip((plain_loss, our_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] != losses[1]
    for name, weight in trainable(ours).items():
        assert relative_difference(weight, trainable(plain)[name]) < rounding.FLOAT32, name


@pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(Blip2ForConditionalGeneration.forward).parameters,
    reason="this transformers does not take encoder outputs",
)
def test_full_models_forward_gives_the_same_loss(dataset: CachedVQADataset) -> None:
    model = plain_lora()
    assert model.config.image_token_id == IMAGE_TOKEN
    batch = dataset.collate([dataset[index] for index in range(5)])
    expected = model.language_model(**language_model_inputs(model, batch)).loss
    outputs = BaseModelOutputWithVisionQformerOutputs(pooler_output=model.language_projection(batch["query_features"]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = model(pixel_values=None, **inputs, mm_encoder_outputs={"image": outputs}).loss
    assert loss.item() == pytest.approx(expected.item(), rel=rounding.FLOAT32)

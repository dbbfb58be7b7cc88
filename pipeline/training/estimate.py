"""How much memory stage two will take, from sizes alone: the model is laid out without storage, and nothing is loaded.

A micro-batch is run on tensors that have a shape and no content; what it keeps for the backward pass is counted.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Blip2Config

from pipeline.batches.sequences import ImageSequence, micro_batches, pack
from pipeline.batches.split import open_split
from pipeline.batches.training import trainable_questions, training_batches
from pipeline.blip2.base_model import check_lora
from pipeline.blip2.checkpoint import LANGUAGE_MODEL_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora
from pipeline.blip2.memory import ActivationMemoryCounter, free_memory_bytes
from pipeline.common.compat import enable_activation_checkpointing, fake_tensor_mode
from pipeline.config import Config, QuantizationConfig
from pipeline.training.trainer import max_tokens_that_fit

BATCHES_LOOKED_AT = 20
BLOCK = 64
"""Weights of bitsandbytes' 4-bit format that share a scale: a float32, or a byte with double quantisation."""


def estimate_training(config: Config) -> dict[str, Any]:
    """What `pipe train` would compute and need; nothing is loaded or written.

    Resident memory on a CPU, torch's on a GPU; pages of the cache that the system keeps mapped are not counted, nor is
    what loading takes before training begins. Raises as `train` does at its start.
    """
    check_lora(config)
    builder = open_split(config, "train")
    questions = trainable_questions(builder, config)
    settings = config.train
    training = training_batches(config, builder, questions)
    batches = [training.build(step) for step in islice(training.sampler, BATCHES_LOOKED_AT)]
    device = pick_device()
    model = _without_storage(config, pick_dtype(config.quantization.compute_dtype, device))
    weights = sum(_weight_bytes(name, weight, config.quantization) for name, weight in model.named_parameters())
    shortest = min((one for batch in batches for one in batch), key=lambda one: one.num_tokens)
    a_node = _saved_bytes(model, [shortest]) / shortest.num_tokens
    nodes = max_tokens_that_fit(a_node, device)
    groups = list(_groups(batches, None if settings.micro_batch == "auto" else settings.micro_batch, nodes))
    largest = max(groups, key=lambda group: sum(one.num_tokens for one in group))
    needed = {
        "libraries": psutil.Process().memory_info().rss if device.type == "cpu" else 0,
        "weights": weights,
        "adapter_and_optimizer": sum(16 * one.numel() for one in model.parameters() if one.requires_grad),
        "activations": _saved_bytes(model, largest),
        "passing": _passing_bytes(model, largest),
    }
    return {
        "questions": len(questions),
        "steps": settings.max_steps or -(-len(questions) // settings.batch_size) * settings.epochs,
        "micro_batches_per_step": len(groups) / len(batches),
        "questions_per_micro_batch": max(sum(one.num_questions for one in group) for group in groups),
        "memory_bytes": {**needed, "all": sum(needed.values())},
        "free_bytes": free_memory_bytes(device),
    }


def _groups(batches: list[list[ImageSequence]], micro_batch: int | None, nodes: int) -> Iterator[list[ImageSequence]]:
    for batch in batches:
        if micro_batch:
            yield from micro_batches(batch, lambda one: one.num_questions, micro_batch)
        else:
            yield from micro_batches(batch, lambda one: one.num_tokens, nodes)


def _without_storage(config: Config, dtype: torch.dtype) -> PeftModel:
    """The language half with its adapter, of tensors that have a shape and no content.

    They are said to lie on a CPU: automatic casting, which decides what is kept, does not know the meta device.
    """
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    architecture = Blip2Config.from_pretrained(folder)
    if config.train.dropout is not None:
        architecture.text_config.dropout = config.train.dropout
    with torch.device("meta"):
        half = Blip2LanguageHalf(architecture).to(dtype).requires_grad_(False)
        model = add_lora(half, **config.lora.model_dump())
    if config.train.gradient_checkpointing:
        enable_activation_checkpointing(model)
    mode, fakes = fake_tensor_mode(), {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in fakes:  # some are tied
                with mode:
                    content = torch.empty(weight.shape, dtype=weight.dtype)
                fakes[weight] = nn.Parameter(content, weight.requires_grad)
            setattr(module, name, fakes[weight])
    return model.train()


def _weight_bytes(name: str, weight: Tensor, quantization: QuantizationConfig) -> int:
    """On the device: linear layers of OPT's decoder in 4 bits, the rest as it is; what is trained counts elsewhere."""
    if weight.requires_grad:
        return 0
    if quantization.bits is None or ".layers." not in name or weight.dim() != 2:
        return weight.nbytes
    scale = 1 + 4 / 256 if quantization.double_quant else 4
    return int(weight.numel() * (0.5 + scale / BLOCK))


def _saved_bytes(model: PeftModel, group: list[ImageSequence]) -> int:
    """What a micro-batch keeps for the backward pass."""
    mode = next(model.parameters()).fake_mode
    dtype = next(weight.dtype for weight in model.parameters() if not weight.requires_grad)
    inputs = {name: _fake(value, mode) for name, value in pack(group).items()}
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with mode, autocast, ActivationMemoryCounter(model.parameters()) as saved:
        model(**inputs)
    return saved.bytes


def _fake(value: Any, mode: Any) -> Any:
    if isinstance(value, list):
        return [_fake(one, mode) for one in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _passing_bytes(model: PeftModel, group: list[ImageSequence]) -> int:
    """What is there for a moment: the largest weight dequantised, gradients of a layer, of logits."""
    text = model.config.text_config
    nodes, labels = sum(one.num_tokens for one in group), sum(len(one.tree.labels) for one in group)
    item = next(weight.itemsize for weight in model.parameters() if not weight.requires_grad)
    layer = nodes * (4 * text.ffn_dim + 8 * text.hidden_size) * item
    return 2 * text.ffn_dim * text.hidden_size * item + max(layer, labels * text.vocab_size * (4 + item))

"""Estimate the steps and the memory of stage two without loading or writing anything.

The model is built from tensors that have a shape and no storage. A micro-batch is run on it, and what autograd would
keep for the backward pass is counted.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Blip2Config

from pipeline.batches.sequences import ImageSequence, pack
from pipeline.batches.split import open_split
from pipeline.batches.training import trainable_questions, training_batches
from pipeline.blip2.base_model import check_lora
from pipeline.blip2.checkpoint import LANGUAGE_MODEL_PREFIXES, fetch_checkpoint
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.language_model import Blip2LanguageHalf, add_lora
from pipeline.blip2.memory import ActivationMemoryCounter, free_memory_bytes
from pipeline.common.compat import enable_activation_checkpointing, fake_tensor_mode
from pipeline.common.result import Result
from pipeline.config import Config, QuantizationConfig, TrainConfig
from pipeline.training.micro_batches import MicroBatcher, max_tokens_that_fit

NUM_SAMPLED_STEPS = 20
"""The micro-batches of this many optimizer steps are built; the largest is run."""
QUANTIZATION_BLOCK = 64
"""Weights of bitsandbytes' 4-bit format that share a scale: a float32, or a byte with double quantization."""
ADAPTER_BYTES_PER_WEIGHT = 16
"""Weight, gradient, and AdamW's two moments, all float32."""


@dataclass(frozen=True)
class TrainEstimate(Result):
    """What `pipe train --dry-run` prints."""

    questions: int
    steps: int
    micro_batches_per_step: float
    questions_per_micro_batch: int
    """In the largest micro-batch."""
    memory_bytes: dict[str, int]
    """By purpose, and their `total`: resident memory on a CPU, torch's allocations on a GPU."""
    free_bytes: int


def estimate_training(config: Config) -> TrainEstimate:
    """Estimate the steps and the memory that `pipe train` takes.

    Memory does not include pages of the cache that the system keeps mapped, nor what loading the model takes.

    Raises:
        PipelineError, CacheError: the config, the checkpoint and the cache do not match, as in `train`.
    """
    check_lora(config)
    builder = open_split(config, "train")
    questions = trainable_questions(builder, config)
    training = training_batches(config, builder, questions)
    steps = [training.build(numbers) for numbers in islice(training.sampler, NUM_SAMPLED_STEPS)]
    device = pick_device()
    model = _model_without_storage(config, pick_dtype(config.quantization.compute_dtype, device))
    micro_batcher = MicroBatcher(None if config.train.micro_batch == "auto" else config.train.micro_batch)
    if micro_batcher.max_size is None:
        shortest = min((sequence for step in steps for sequence in step), key=lambda sequence: sequence.num_tokens)
        micro_batcher.max_size = max_tokens_that_fit(_activation_bytes(model, [shortest]) / shortest.num_tokens, device)
    groups = [group for step in steps for group in micro_batcher.split(step)]
    memory_bytes = _memory_bytes(model, max(groups, key=_num_tokens), config.quantization, device)
    return TrainEstimate(
        questions=len(questions),
        steps=num_training_steps(config.train, len(questions)),
        micro_batches_per_step=len(groups) / len(steps),
        questions_per_micro_batch=max(sum(sequence.num_questions for sequence in group) for group in groups),
        memory_bytes={**memory_bytes, "total": sum(memory_bytes.values())},
        free_bytes=free_memory_bytes(device),
    )


def num_training_steps(settings: TrainConfig, num_questions: int) -> int:
    """Return the number of optimizer steps, as transformers' trainer computes it."""
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(num_questions / settings.batch_size))


def _num_tokens(group: list[ImageSequence]) -> int:
    return sum(sequence.num_tokens for sequence in group)


def _memory_bytes(
    model: PeftModel, largest: list[ImageSequence], quantization: QuantizationConfig, device: torch.device
) -> dict[str, int]:
    """Return the memory of a training whose largest micro-batch is `largest`, by purpose."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        "libraries": psutil.Process().memory_info().rss if device.type == "cpu" else 0,
        "weights": sum(_weight_bytes(name, weight, quantization) for name, weight in model.named_parameters()),
        "adapter_and_optimizer": ADAPTER_BYTES_PER_WEIGHT * trained,
        "activations": _activation_bytes(model, largest),
        "temporary": _temporary_bytes(model, largest),
    }


def _model_without_storage(config: Config, dtype: torch.dtype) -> PeftModel:
    """Return the language half with its adapter, made of fake tensors.

    They claim to be on the CPU: autocast, which affects what is kept for the backward pass, does not know the meta
    device.
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
            if weight not in fakes:  # some weights are tied
                with mode:
                    content = torch.empty(weight.shape, dtype=weight.dtype)
                fakes[weight] = nn.Parameter(content, weight.requires_grad)
            setattr(module, name, fakes[weight])
    return model.train()


def _weight_bytes(name: str, weight: Tensor, quantization: QuantizationConfig) -> int:
    """Return the memory of a frozen weight, 0 for a trained one; OPT's decoder layers are quantized to 4 bits."""
    if weight.requires_grad:
        return 0
    if quantization.bits is None or ".layers." not in name or weight.dim() != 2:
        return weight.nbytes
    scale_bytes = 1 + 4 / 256 if quantization.double_quant else 4
    return int(weight.numel() * (0.5 + scale_bytes / QUANTIZATION_BLOCK))


def _activation_bytes(model: PeftModel, group: list[ImageSequence]) -> int:
    """Return what a micro-batch keeps for the backward pass."""
    mode = next(model.parameters()).fake_mode
    dtype = next(weight.dtype for weight in model.parameters() if not weight.requires_grad)
    inputs = {name: _to_fake(value, mode) for name, value in pack(group).items()}
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with mode, autocast, ActivationMemoryCounter(model.parameters()) as saved:
        model(**inputs)
    return saved.bytes


def _to_fake(value: Any, mode: Any) -> Any:
    if isinstance(value, list):
        return [_to_fake(item, mode) for item in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _temporary_bytes(model: PeftModel, group: list[ImageSequence]) -> int:
    """Return the peak of temporary tensors: the largest dequantized weight, and a layer's or the logits' gradients."""
    text = model.config.text_config
    num_tokens, num_labels = _num_tokens(group), sum(len(sequence.tree.labels) for sequence in group)
    itemsize = next(weight.itemsize for weight in model.parameters() if not weight.requires_grad)
    layer_bytes = num_tokens * (4 * text.ffn_dim + 8 * text.hidden_size) * itemsize
    logits_bytes = num_labels * text.vocab_size * (4 + itemsize)
    return 2 * text.ffn_dim * text.hidden_size * itemsize + max(layer_bytes, logits_bytes)

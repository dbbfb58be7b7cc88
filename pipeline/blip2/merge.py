"""A full BLIP-2 in float16 with a run's adapter folded into its weights, written tensor by tensor.

The adapter was trained on top of the dequantised 4-bit weights; it is these that it is folded into, not the
checkpoint's. All else is the checkpoint's.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2Config

from pipeline.blip2.checkpoint import tensor_files
from pipeline.blip2.checkpoint_check import model_tensors
from pipeline.blip2.checkpoint_files import INDEX, SMALL_FILES, WEIGHTS
from pipeline.common.errors import PipelineError
from pipeline.common.progress import progress_bar

SHARD_BYTES = 1 << 30
"""Of a file, unless one tensor has more."""
_BYTES = 2  # of a number in float16
_TIED = ("language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight")

Folded = dict[str, Callable[[], Tensor]]


def merged_bytes(checkpoint: Path) -> int:
    """Of the weights that `write_merged` writes, to a few kilobytes."""
    return _BYTES * sum(map(prod, _shapes(_merged_config(checkpoint, {})).values()))


@torch.no_grad()
def write_merged(checkpoint: Path, model: PeftModel, folder: Path) -> None:
    """Writes into `folder` what plain `from_pretrained` takes: weights, config, tokenizer and image processor.

    Args:
        checkpoint: all of what `model` is a half of.
        model: the language half with its adapter; one that has not answered yet, for on CPUs with bfloat16
            instructions that rounds the scales of 4-bit weights.
        folder: there, and empty.

    Raises:
        PipelineError: a tensor is missing, or has a value that float16 cannot hold.
    """
    folded = merged_weights(model)
    config = _merged_config(checkpoint, folded)
    shapes = _shapes(config)
    source = _Source(checkpoint, folded)
    shards = list(_shards(shapes))
    where: dict[str, str] = {}
    with progress_bar("merging", sum(map(prod, shapes.values())), "", scaled=True) as bar:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS
            save_file({name: source[name] for name in names}, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
            bar.update(sum(prod(shapes[name]) for name in names))
    if len(shards) > 1:
        total = _BYTES * sum(map(prod, shapes.values()))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(folder / "config.json", config)
    for path in _small_files(checkpoint):
        shutil.copyfile(path, folder / path.name)


def merged_weights(model: PeftModel) -> Folded:
    """Name in the full model -> what makes the float32 weight, of all that is not the checkpoint's own.

    These are the 4-bit weights, dequantised; those with an adapter, and it folded in; and biases, where they were
    trained.
    """
    half = model.get_base_model()
    folded: Folded = {}
    for name, module in half.named_modules():
        if isinstance(module, LoraLayer):
            folded[f"{name}.weight"] = partial(_fold, module)
        elif isinstance(module, Linear4bit) and not name.endswith(".base_layer"):
            folded[f"{name}.weight"] = partial(_dequantised, module)
    if model.active_peft_config.bias != "none":
        biases = {name.replace(".base_layer", ""): bias for name, bias in half.named_parameters()}
        folded |= {name: bias.float for name, bias in biases.items() if name.endswith(".bias")}
    return folded


def _fold(module: Any) -> Tensor:
    weight = _dequantised(module.get_base_layer())
    for adapter in module.active_adapters:
        weight += module.get_delta_weight(adapter).float()
    return weight


def _dequantised(module: nn.Module) -> Tensor:
    """Rounded to the dtype that it is computed in, as in training."""
    return dequantize_module_weight(module).detach().to(torch.float32, copy=True)


class _Source:
    """Tensors of the merged model by name, in float16 and on the CPU, made when they are asked for."""

    def __init__(self, checkpoint: Path, folded: Folded):
        self.checkpoint, self.folded, self.files = checkpoint, folded, tensor_files(checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        make = self.folded.get(name)
        tensor = make() if make else self._read(name)
        half = tensor.to(torch.float16).cpu()
        if not half.isfinite().all():
            raise PipelineError(
                f"{name}: its largest value is {tensor.abs().max():g}, and float16 ends at "
                f"{torch.finfo(torch.float16).max:g}; export the adapter without --merge"
            )
        return half.contiguous()

    def _read(self, name: str) -> Tensor:
        if name not in self.files and name in _TIED:
            [name] = set(_TIED) - {name}  # a checkpoint may hold either
        if name not in self.files:
            raise PipelineError(f"{self.checkpoint}: the checkpoint is not whole, it lacks {name}; get it again")
        return _tensor(self.files[name], name)


def _merged_config(checkpoint: Path, folded: Folded) -> dict[str, Any]:
    """The checkpoint's `config.json`, of float16; untied, where one of two tied weights is not as the other."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype", "quantization_config"):
            section.pop(key, None)
    if folded.keys() & set(_TIED) or _differ(checkpoint):
        config.setdefault("text_config", {})["tie_word_embeddings"] = False
    return {**config, "dtype": "float16"}


def _differ(checkpoint: Path) -> bool:
    """Whether the checkpoint has two weights where its config says one: plain `from_pretrained` then ties nothing."""
    files = tensor_files(checkpoint)
    if not files.keys() >= set(_TIED):
        return False
    first, second = (_tensor(files[name], name) for name in _TIED)
    return not torch.equal(first, second)


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Of each tensor that the full model is loaded from."""
    shapes, tied = model_tensors(Blip2Config.from_dict(config))
    return {name: shape for name, shape in shapes.items() if not (name in tied and name == _TIED[0])}


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _BYTES * prod(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _BYTES * prod(shape)
    yield names


def _small_files(checkpoint: Path) -> list[Path]:
    """Tokenizer, image processor, generation config; not what is about the weights."""
    found = [path for pattern in SMALL_FILES for path in checkpoint.glob(pattern)]
    return [path for path in found if path.name != "config.json" and not path.name.endswith(".index.json")]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

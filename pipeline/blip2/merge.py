"""Merges an adapter into a full BLIP-2 in float16, written tensor by tensor.

The adapter was trained on the dequantized 4-bit weights, so it is merged into these and not into the weights of the
checkpoint. All other weights are those of the checkpoint.
"""

import json
import shutil
from collections.abc import Callable
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
from pipeline.blip2.checkpoint_files import INDEX, SMALL_FILES, WEIGHTS, group_into_shards
from pipeline.common.errors import PipelineError
from pipeline.common.progress import progress_bar

MAX_SHARD_BYTES = 1 << 30
_BYTES = 2  # per float16 number
_TIED = ("language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight")

MergedWeights = dict[str, Callable[[], Tensor]]
"""Name in the full model -> function that computes the float32 weight."""


def merged_bytes(checkpoint: Path) -> int:
    """Return the size of the weights that `write_merged` writes, to within a few kilobytes."""
    return _BYTES * sum(map(prod, _shapes(_merged_config(checkpoint, {})).values()))


@torch.no_grad()
def write_merged(checkpoint: Path, model: PeftModel, folder: Path) -> None:
    """Write the merged model for `from_pretrained`: weights, config, tokenizer and image processor.

    Args:
        checkpoint: folder of the full checkpoint.
        model: the language half with its adapter.
        folder: an empty folder.

    Raises:
        PipelineError: a tensor is missing, or has a value outside the range of float16.
    """
    merged = merged_weights(model)
    config = _merged_config(checkpoint, merged)
    shapes = _shapes(config)
    tensors = _MergedTensors(checkpoint, merged)
    shards = group_into_shards({name: _BYTES * prod(shape) for name, shape in shapes.items()}, MAX_SHARD_BYTES)
    weight_map: dict[str, str] = {}
    with progress_bar("merging", sum(map(prod, shapes.values())), "", scaled=True) as bar:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            bar.update(sum(prod(shapes[name]) for name in names))
    if len(shards) > 1:
        total = _BYTES * sum(map(prod, shapes.values()))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", config)
    for path in _small_files(checkpoint):
        shutil.copyfile(path, folder / path.name)


def merged_weights(model: PeftModel) -> MergedWeights:
    """Return the weights that differ from the checkpoint.

    These are the dequantized 4-bit weights, those of adapted layers with the adapter merged in, and trained biases.
    """
    half = model.get_base_model()
    merged: MergedWeights = {}
    for name, module in half.named_modules():
        if isinstance(module, LoraLayer):
            merged[f"{name}.weight"] = partial(_merge_layer, module)
        elif isinstance(module, Linear4bit) and not name.endswith(".base_layer"):
            merged[f"{name}.weight"] = partial(_dequantize, module)
    if model.active_peft_config.bias != "none":
        biases = {name.replace(".base_layer", ""): bias for name, bias in half.named_parameters()}
        merged |= {name: bias.float for name, bias in biases.items() if name.endswith(".bias")}
    return merged


def _merge_layer(module: Any) -> Tensor:
    weight = _dequantize(module.get_base_layer())
    for adapter in module.active_adapters:
        weight += module.get_delta_weight(adapter).float()
    return weight


def _dequantize(module: nn.Module) -> Tensor:
    """Dequantize to the compute dtype, as training does, and return it as float32."""
    return dequantize_module_weight(module).detach().to(torch.float32, copy=True)


class _MergedTensors:
    """Tensors of the merged model by name, in float16 on the CPU, computed on access."""

    def __init__(self, checkpoint: Path, merged: MergedWeights):
        self.checkpoint, self.merged, self.files = checkpoint, merged, tensor_files(checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        compute = self.merged.get(name)
        tensor = compute() if compute else self._read(name)
        rounded = tensor.to(torch.float16).cpu()
        if not rounded.isfinite().all():
            raise PipelineError(
                f"{name}: its largest value is {tensor.abs().max():g}, but the maximum of float16 is "
                f"{torch.finfo(torch.float16).max:g}; export the adapter without --merge"
            )
        return rounded.contiguous()

    def _read(self, name: str) -> Tensor:
        if name not in self.files and name in _TIED:
            [name] = set(_TIED) - {name}  # a checkpoint may contain either one
        if name not in self.files:
            raise PipelineError(f"{self.checkpoint}: the checkpoint is incomplete: missing {name}; download it again")
        return _tensor(self.files[name], name)


def _merged_config(checkpoint: Path, merged: MergedWeights) -> dict[str, Any]:
    """Return the checkpoint's config for float16, without weight tying if the two tied weights differ."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype", "quantization_config"):
            section.pop(key, None)
    if merged.keys() & set(_TIED) or _tied_weights_differ(checkpoint):
        config.setdefault("text_config", {})["tie_word_embeddings"] = False
    return {**config, "dtype": "float16"}


def _tied_weights_differ(checkpoint: Path) -> bool:
    """Return whether the checkpoint has two different weights where its config ties them: they are loaded untied."""
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
    """Return the shape of each tensor in the files of the full model."""
    shapes, tied = model_tensors(Blip2Config.from_dict(config))
    return {name: shape for name, shape in shapes.items() if not (name in tied and name == _TIED[0])}


def _small_files(checkpoint: Path) -> list[Path]:
    """Return the files of the tokenizer, the image processor and the generation config."""
    found = [path for pattern in SMALL_FILES for path in checkpoint.glob(pattern)]
    return [path for path in found if path.name != "config.json" and not path.name.endswith(".index.json")]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

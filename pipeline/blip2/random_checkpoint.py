"""Writes BLIP-2 checkpoints of real sizes with random weights, for benchmarks without a download."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from pipeline.blip2.checkpoint_files import INDEX, group_into_shards
from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.common.files import write_text
from pipeline.common.progress import progress_bar

MAX_SHARD_BYTES = 2 << 30
_OPT = {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50304, "eos_token_id": 50118}
SIZES = {
    "tiny": None,
    "opt-350m": _OPT
    | {
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_size": 1024,
        "word_embed_proj_dim": 1024,
        "ffn_dim": 4096,
    },
    "blip2-opt-2.7b": _OPT | {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "blip2-opt-6.7b": _OPT | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
}
"""OPT configs by name, as published (350m with the norms and embedding of the larger ones). `tiny` is the config of the
embedded checkpoint."""


def config_of(size: str) -> Blip2Config:
    """Return the config of a size: ViT-g, a Q-Former of 12 layers with 32 query tokens (the defaults), and OPT."""
    text = SIZES[size]
    if text is None:
        return Blip2Config.from_pretrained(embedded_checkpoint())
    return Blip2Config(text_config=OPTConfig(**text).to_dict(), num_query_tokens=32, image_token_index=50265)


def write_random_checkpoint(folder: Path, size: str) -> None:
    """Write a config and sharded bfloat16 weights, normally distributed with a standard deviation of 0.02."""
    config = config_of(size)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Blip2ForConditionalGeneration(config).state_dict().items()}
    del shapes["language_model.lm_head.weight"]  # tied to the token embedding
    shards = group_into_shards({name: 2 * shape.numel() for name, shape in shapes.items()}, MAX_SHARD_BYTES)
    weight_map: dict[str, str] = {}
    with progress_bar("random weights", sum(shape.numel() for shape in shapes.values()), "", scaled=True) as bar:
        for number, names in enumerate(shards):
            file = f"model-{number:05d}.safetensors"
            tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16).mul_(0.02) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            bar.update(sum(tensor.numel() for tensor in tensors.values()))
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))

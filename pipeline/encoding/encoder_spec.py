"""What the features of a checkpoint's encoder are: the `CacheSpec` that stage one writes and stage two checks."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from cache.spec import CacheSpec
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fingerprint
from pipeline.common.errors import PipelineError
from pipeline.encoding.images import Preprocessor

# What of the config decides the features. Named one by one: a new release of transformers may add keys, and no cache
# is stale for that.
_LAYERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
_SETTINGS = {
    "vision_config": (*_LAYERS, "image_size", "patch_size", "qkv_bias"),
    "qformer_config": (*_LAYERS, "cross_attention_frequency", "encoder_hidden_size", "use_qformer_text_input"),
}


def encoder_settings(folder: Path) -> dict[str, Any]:
    """What the encoder computes with its tensors, by `config.json` and the defaults for what that leaves out."""
    model = Blip2Config.from_pretrained(folder)
    settings = {
        f"{section}.{key}": getattr(getattr(model, section), key) for section, keys in _SETTINGS.items() for key in keys
    }
    return {"num_query_tokens": model.num_query_tokens, **settings}


def load_preprocessor(folder: Path) -> Preprocessor:
    """The checkpoint's preprocessing. Raises `PipelineError` if its pixels are not those that the encoder takes."""
    preprocess = Preprocessor(folder)
    side = Blip2Config.from_pretrained(folder).vision_config.image_size
    if preprocess.size != (side, side):
        height, width = preprocess.size
        raise PipelineError(
            f"{folder}: the image processor's size is {height} x {width}, and config.json has "
            f"vision_config.image_size {side}; they are not of one checkpoint"
        )
    return preprocess


def encoder_spec(folder: Path, encoder_dtype: str, storage_dtype: str, encoder_fingerprint: str = "") -> CacheSpec:
    """From the checkpoint's files alone; no model is loaded.

    `encoder_fingerprint`, where the tensors cannot be had, takes the place of the one over them and the settings.
    """
    settings = encoder_settings(folder)
    return CacheSpec(
        encoder_fingerprint=encoder_fingerprint or _fingerprint(folder, settings),
        encoder_dtype=encoder_dtype,
        image_preprocessing=load_preprocessor(folder).settings_json(),
        query_tokens=settings["num_query_tokens"],
        width=settings["qformer_config.hidden_size"],
        dtype=storage_dtype,
    )


def _fingerprint(folder: Path, settings: dict[str, Any]) -> str:
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{fingerprint(folder, ENCODER_PREFIXES)} {canonical}".encode()).hexdigest()

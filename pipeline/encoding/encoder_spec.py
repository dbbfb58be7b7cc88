"""Compute the `CacheSpec` of a checkpoint's encoder, which stage one writes and stage two checks."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from cache.spec import CacheSpec
from pipeline.blip2.checkpoint import ENCODER_PREFIXES, fingerprint
from pipeline.common.errors import PipelineError
from pipeline.encoding.images import Preprocessor

# The config keys that determine the features. They are listed, since keys that a new release of transformers adds must
# not invalidate caches.
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
    """Return the settings that determine what the encoder computes, from `config.json` and the library's defaults."""
    model = Blip2Config.from_pretrained(folder)
    settings = {
        f"{section}.{key}": getattr(getattr(model, section), key) for section, keys in _SETTINGS.items() for key in keys
    }
    return {"num_query_tokens": model.num_query_tokens, **settings}


def load_preprocessor(folder: Path) -> Preprocessor:
    """Load the checkpoint's preprocessing. Raises `PipelineError` if its image size is not the encoder's."""
    preprocess = Preprocessor(folder)
    side = Blip2Config.from_pretrained(folder).vision_config.image_size
    if preprocess.size != (side, side):
        height, width = preprocess.size
        raise PipelineError(
            f"{folder}: the image processor's size is {height} x {width}, but config.json has "
            f"vision_config.image_size {side}; they belong to different checkpoints"
        )
    return preprocess


def encoder_spec(folder: Path, encoder_dtype: str, storage_dtype: str, encoder_fingerprint: str = "") -> CacheSpec:
    """Compute the spec from the checkpoint's files, without loading the model.

    Args:
        folder: the checkpoint.
        encoder_dtype: dtype of the encoder.
        storage_dtype: dtype of the stored features.
        encoder_fingerprint: used as it is if the encoder's tensors are not on this machine; empty: computed from them.
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

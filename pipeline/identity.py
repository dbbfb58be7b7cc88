"""What the features of a checkpoint's encoder are: the `CacheSpec` that stage one writes and stage two checks."""

from pathlib import Path

from transformers import Blip2Config

from cache.spec import CacheSpec
from pipeline.checkpoint import ENCODER_HALF, fingerprint
from pipeline.images import Preprocessor


def encoder_spec(folder: Path, encoder_dtype: str, storage_dtype: str, encoder_fingerprint: str = "") -> CacheSpec:
    """From the checkpoint's files alone; no model is loaded.

    `encoder_fingerprint`, where it is known already or cannot be had, saves reading the encoder's tensors.
    """
    model = Blip2Config.from_pretrained(folder)
    return CacheSpec(
        encoder_fingerprint=encoder_fingerprint or fingerprint(folder, ENCODER_HALF),
        encoder_dtype=encoder_dtype,
        image_preprocessing=Preprocessor(folder).identity(),
        query_tokens=model.num_query_tokens,
        width=model.qformer_config.hidden_size,
        dtype=storage_dtype,
    )

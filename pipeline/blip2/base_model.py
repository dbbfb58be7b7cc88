"""The language half that a config names, without an adapter."""

import torch
from transformers import Blip2Config

from pipeline.blip2.checkpoint import LANGUAGE_MODEL_PREFIXES, fetch_checkpoint, public_name
from pipeline.blip2.device import pick_device, pick_dtype
from pipeline.blip2.language_model import Blip2LanguageHalf, load_language_half
from pipeline.blip2.lora import resolve_targets
from pipeline.config import Config


def load_base(config: Config, dropout: float | None = None) -> Blip2LanguageHalf:
    """Load the language half onto this rank's device, quantized according to `config`.

    Args:
        config: its `model` and `quantization` sections are used.
        dropout: replaces the checkpoint's own.
    """
    model, quantization = config.model, config.quantization
    device = pick_device()
    base = load_language_half(
        fetch_checkpoint(model.checkpoint, model.revision, LANGUAGE_MODEL_PREFIXES),
        device,
        pick_dtype(quantization.compute_dtype, device),
        quantization.bits,
        quantization.quant_type,
        quantization.double_quant,
        dropout,
    )
    base.name_or_path = public_name(model.checkpoint)  # PEFT writes it as base_model_name_or_path
    return base


def check_lora(config: Config) -> None:
    """Check `lora.target_modules` against the language model without loading any weights.

    Raises:
        ConfigError: a name matches no linear layer.
    """
    folder = fetch_checkpoint(config.model.checkpoint, config.model.revision, LANGUAGE_MODEL_PREFIXES)
    with torch.device("meta"):
        resolve_targets(Blip2LanguageHalf(Blip2Config.from_pretrained(folder)), config.lora.target_modules)

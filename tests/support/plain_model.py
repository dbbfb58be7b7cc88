"""The full model, loaded and trained by plain transformers."""

from pathlib import Path

import torch
from transformers import AutoProcessor, BitsAndBytesConfig, Blip2ForConditionalGeneration

from cache.text import TextTable
from pipeline.data.examples import VQAExample

CPU = torch.device("cpu")


def load_full(folder: Path, bits: int | None) -> Blip2ForConditionalGeneration:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["vision_model", "qformer", "language_projection", "lm_head"],
    )
    model = Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map={"": CPU}, quantization_config=quantization if bits else None
    )
    return model.eval()


def load_processor(folder: Path, padding_side: str) -> AutoProcessor:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = padding_side
    return processor


def examples_of(text: TextTable) -> list[VQAExample]:
    return [VQAExample.from_record(text.record(i)) for i in range(len(text))]


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def make_lora_nonzero(model: torch.nn.Module, seed: int = 0) -> None:
    """Set A and B to random values, the same for every model: with B at zero, the gradient of A is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))

"""The model card: what an exported folder is, and how it is loaded."""

import json
from pathlib import Path

from pipeline.config import SPLITS, Config
from pipeline.run_folder import RunFolder

_MERGED = """\
from transformers import AutoProcessor, Blip2ForConditionalGeneration

model = Blip2ForConditionalGeneration.from_pretrained(FOLDER, device_map="auto")
processor = AutoProcessor.from_pretrained(FOLDER)"""

_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoProcessor, BitsAndBytesConfig, Blip2ForConditionalGeneration

{quantization}model = Blip2ForConditionalGeneration.from_pretrained(
    "{checkpoint}", dtype=torch.bfloat16, device_map="auto"{quantized}
)
model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained("{checkpoint}")"""

_QUANTIZATION = """\
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{quant_type}",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.bfloat16,
    # The language model alone: this is what the adapter was trained on.
    llm_int8_skip_modules=["vision_model", "qformer", "language_projection", "lm_head"],
)
"""

_ANSWER = """\
inputs = processor(images=image, text="{prompt}", return_tensors="pt").to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, num_beams={num_beams}, do_sample=False)
answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()"""


def model_card(run: RunFolder, config: Config, merged: bool) -> str:
    """Markdown with the hub's front matter: loading, prompt, training, and the accuracies that the run has measured."""
    what = "with a LoRA adapter folded into its language model" if merged else "LoRA adapter of its language model"
    lines = [
        *_front_matter(config, merged),
        "",
        f"# BLIP-2 for visual question answering, {what}",
        "",
        f"From `{config.model.checkpoint}`. In `{{question}}`'s place stands a question, FOLDER is this folder's name:",
        "",
        "```python",
        _loading(config, merged),
        _ANSWER.format(prompt=config.data.prompt, **config.evaluate.model_dump()),
        "```",
        "",
        f"LoRA: {json.dumps(config.lora.model_dump())}. Language model in training: "
        f"{json.dumps(config.quantization.model_dump())}. Data format: {config.data.format}.",
        *_accuracies(run),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(config: Config, merged: bool) -> list[str]:
    checkpoint = config.model.checkpoint
    on_hub = checkpoint.count("/") == 1 and not Path(checkpoint).exists()
    return [
        "---",
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: visual-question-answering",
        *([f"base_model: {checkpoint}"] if on_hub else []),  # the hub takes no folder there
        "tags: [blip-2, lora]",
        "---",
    ]


def _loading(config: Config, merged: bool) -> str:
    if merged:
        return _MERGED
    in_4_bits = config.quantization.bits is not None
    return _ADAPTER.format(
        checkpoint=config.model.checkpoint,
        quantization=_QUANTIZATION.format(**config.quantization.model_dump()) if in_4_bits else "",
        quantized=", quantization_config=quantization" if in_4_bits else "",
    )


def _accuracies(run: RunFolder) -> list[str]:
    lines = []
    for split in SPLITS:
        path = run.evaluation(split, with_adapter=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("accuracy") is not None:
            lines.append(
                f"Accuracy on `{split}`: {found['accuracy']:.2f} ({found['questions']} questions, {found['method']})."
            )
    return ["", *lines] if lines else []

"""The model card of an adapter or an exported model: how it is loaded, what it reaches, where it comes from."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.files import write_text
from pipeline.config import Config, load_config
from pipeline.runs.record import read_evaluations, read_record
from pipeline.runs.run import Run

_MERGED = """\
from transformers import AutoProcessor, Blip2ForConditionalGeneration

model = Blip2ForConditionalGeneration.from_pretrained(FOLDER, device_map="auto")
processor = AutoProcessor.from_pretrained(FOLDER)"""

_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoProcessor, BitsAndBytesConfig, Blip2ForConditionalGeneration

{named}{quantization}model = Blip2ForConditionalGeneration.from_pretrained(
    checkpoint, dtype=torch.bfloat16, device_map="auto"{quantized}
)
model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained(checkpoint)"""

_EMBEDDED = """\
from pipeline.blip2.embedded import embedded_checkpoint  # blip2-vqa-pipeline's

checkpoint = str(embedded_checkpoint())
"""

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


def write_card(run: Run, adapter: Path | None = None) -> None:
    """The README.md of the run's adapter, with what is known by now; the same run gives the same bytes."""
    write_text((adapter or run.adapter) / "README.md", model_card(run, load_config(run.config), merged=False))


def model_card(run: Run, config: Config, merged: bool) -> str:
    """Markdown with the hub's front matter: loading, results, and the data and features that lead to them."""
    what = "with a LoRA adapter folded into its language model" if merged else "LoRA adapter of its language model"
    lines = [
        *_front_matter(config, merged),
        "",
        f"# BLIP-2 for visual question answering, {what}",
        "",
        f"From `{config.model.checkpoint}`. In `{{question}}`'s place stands a question; FOLDER is this folder's name, "
        "`image` a picture opened by Pillow and turned upright (`PIL.ImageOps.exif_transpose`):",
        "",
        "```python",
        _loading(config, merged),
        _ANSWER.format(prompt=config.data.prompt, **config.evaluate.model_dump()),
        "```",
        "",
        "Take `<image>`, `</s>` and the like out of questions: in training they were text, to the processor they are "
        "special tokens.",
        "",
        *_results(run),
        "",
        f"LoRA: {json.dumps(config.lora.model_dump())}. Language model in training: "
        f"{json.dumps(config.quantization.model_dump())}. Data format: {config.data.format}.",
        *_origin(read_record(run)),
    ]
    return "\n".join(lines) + "\n"


def _results(run: Run) -> list[str]:
    found = [_result(one) for one in read_evaluations(run)]
    validation = read_record(run).get("summary", {}).get("validation", {})
    if "best_accuracy" in validation:
        found.append(
            f"| validation questions while training | {validation['best_accuracy']:.2f} | step "
            f"{validation['best_step']}, the best of {validation['num_validations']} |"
        )
    return ["## Results", "", "| questions | VQA accuracy | |", "|---|---|---|", *(found or ["| none yet | | |"])]


def _result(one: dict[str, Any]) -> str:
    who = "with the adapter" if one["adapter"] else "without it"
    if one["accuracy"] is None:
        return f"| {one['split']}, {who} | not known: no answers to compare | |"
    interval = one.get("accuracy_interval")
    reach = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    how = f"{one['metric']}, {one['num_beams']} beams, {one['scored']} questions"
    return f"| {one['split']}, {who} | {one['accuracy']:.2f}{reach} | {how} |"


def _origin(record: dict[str, Any]) -> list[str]:
    """The cache that it was trained from, by what identifies its features, and the versions."""
    if not record:
        return []
    cache = record["cache"]
    sources = [(f"SHA-256 of {split} {key}", one) for split, files in cache["sources"].items()
               for key, one in files.items()]  # fmt: skip
    known = [("fingerprint", cache["fingerprint"]), *cache["spec"].items(), ("pictures", cache["images"]), *sources]
    return [
        "",
        "## Features that it was trained from",
        "",
        "| of the cache, as `pipe cache info` says | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in known),
        "",
        f"Seed {record['seed']}. " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()) + ".",
    ]


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
        named=_EMBEDDED if config.model.checkpoint == "embedded" else f'checkpoint = "{config.model.checkpoint}"\n',
        quantization=_QUANTIZATION.format(**config.quantization.model_dump()) if in_4_bits else "",
        quantized=", quantization_config=quantization" if in_4_bits else "",
    )

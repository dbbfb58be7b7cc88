"""Write the model card of an adapter or an exported model: loading code, results and provenance."""

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

{checkpoint}{quantization}model = Blip2ForConditionalGeneration.from_pretrained(
    checkpoint, dtype=torch.bfloat16, device_map="auto"{argument}
)
model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained(checkpoint)"""

_EMBEDDED = """\
from pipeline.blip2.embedded import embedded_checkpoint  # from blip2-vqa-pipeline

checkpoint = str(embedded_checkpoint())
"""

_QUANTIZATION = """\
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{quant_type}",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.bfloat16,
    # Only the language model is quantized, as in training.
    llm_int8_skip_modules=["vision_model", "qformer", "language_projection", "lm_head"],
)
"""

_ANSWER = """\
inputs = processor(images=image, text="{prompt}", return_tensors="pt").to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, num_beams={num_beams}, do_sample=False)
answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()"""


def write_card(run: Run, adapter: Path | None = None) -> None:
    """Write the README.md of the run's adapter, with the results known so far. It is the same bytes for the same run.

    Args:
        run: a run with a config.
        adapter: the adapter's folder, by default `run.adapter`.
    """
    write_text((adapter or run.adapter) / "README.md", model_card(run, load_config(run.config), merged=False))


def model_card(run: Run, config: Config, merged: bool) -> str:
    """Return the model card: Markdown with the hub's front matter.

    Args:
        run: the run that the model comes from.
        config: the run's config, with overrides.
        merged: whether the card is for a full model with the adapter merged, not for the adapter.
    """
    what = "with a LoRA adapter merged into the language model" if merged else "LoRA adapter for the language model"
    lines = [
        *_front_matter(config, merged),
        "",
        f"# BLIP-2 for visual question answering, {what}",
        "",
        f"Base model: `{config.model.checkpoint}`. Replace `{{question}}` by a question and FOLDER by the path of this "
        "folder; `image` is a Pillow image, turned upright (`PIL.ImageOps.exif_transpose`):",
        "",
        "```python",
        _loading_code(config, merged),
        _ANSWER.format(prompt=config.data.prompt, **config.evaluate.model_dump()),
        "```",
        "",
        "Remove `<image>`, `</s>` and the like from questions: the processor reads them as special tokens, and in "
        "training they were plain text.",
        "",
        *_results(run),
        "",
        "## Training",
        "",
        f"LoRA: {json.dumps(config.lora.model_dump())}. Quantization of the language model: "
        f"{json.dumps(config.quantization.model_dump())}. Data format: {config.data.format}.",
        *_provenance(read_record(run)),
    ]
    return "\n".join(lines) + "\n"


def _results(run: Run) -> list[str]:
    rows = [_result_row(summary) for summary in read_evaluations(run)]
    validation = read_record(run).get("summary", {}).get("validation") or {}
    if "best_accuracy" in validation:
        rows.append(
            f"| validation during training | {validation['best_accuracy']:.2f} | step {validation['best_step']}, the "
            f"best of {validation['num_validations']} validations |"
        )
    header = ["## Results", "", "| evaluated on | VQA accuracy | details |", "|---|---|---|"]
    return [*header, *(rows or ["| none yet | | |"])]


def _result_row(summary: dict[str, Any]) -> str:
    name = f"{summary['split']}, {'with' if summary['adapter'] else 'without'} the adapter"
    if summary["accuracy"] is None:
        return f"| {name} | unknown: the split has no references | |"
    interval = summary.get("accuracy_interval")
    bounds = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    beams = f"{summary['num_beams']} beams" if summary["num_beams"] > 1 else "greedy"
    details = f"metric {summary['metric']}, {beams}, {summary['scored']} questions"
    return f"| {name} | {summary['accuracy']:.2f}{bounds} | {details} |"


def _provenance(record: dict[str, Any]) -> list[str]:
    """Return the fields that identify the cache the adapter was trained from, and the library versions."""
    if not record:
        return []
    cache = record["cache"]
    sources = [
        (f"SHA-256 of {split} {key}", digest)
        for split, files in cache["sources"].items()
        for key, digest in files.items()
    ]
    fields = [("fingerprint", cache["fingerprint"]), *cache["spec"].items(), ("images", cache["images"]), *sources]
    return [
        "",
        "## Cached features",
        "",
        "| field of the cache, as in `pipe cache info` | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in fields),
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
        *([f"base_model: {checkpoint}"] if on_hub else []),  # the hub accepts no local path here
        "tags: [blip-2, lora]",
        "---",
    ]


def _loading_code(config: Config, merged: bool) -> str:
    if merged:
        return _MERGED
    checkpoint = config.model.checkpoint
    is_quantized = config.quantization.bits is not None
    return _ADAPTER.format(
        checkpoint=_EMBEDDED if checkpoint == "embedded" else f'checkpoint = "{checkpoint}"\n',
        quantization=_QUANTIZATION.format(**config.quantization.model_dump()) if is_quantized else "",
        argument=", quantization_config=quantization" if is_quantized else "",
    )

"""What a run was made of and what came out: `run.json`, and the adapter's model card that is written from it."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.reader import FeatureReader
from pipeline.config import Config, load_config
from pipeline.run_folder import RunFolder

LIBRARIES = ("blip2-vqa-pipeline", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "h5py", "numpy")


def begin_record(run: RunFolder, config: Config, features: FeatureReader, device: str, dtype: str) -> None:
    """Writes what the run is made of; of a run that is gone on with, anew."""
    manifest = features.manifest
    record = {
        "seed": config.train.seed,
        "device": device,
        "compute_dtype": dtype,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "cache": {
            "dir": str(config.cache.dir),
            "fingerprint": manifest.fingerprint,
            "spec": manifest.spec.to_attributes(),
            "images": manifest.rows,
            "questions": {split: text.questions for split, text in manifest.splits.items()},
            "sources": manifest.provenance.get("sources", {}),
        },
    }
    _write_json(record, run.record)


def end_record(run: RunFolder, summary: dict[str, Any]) -> None:
    """Adds what came out."""
    _write_json({**read_record(run), "summary": summary}, run.record)


def read_record(run: RunFolder) -> dict[str, Any]:
    """What is known of the run; nothing of one that never began."""
    found: dict[str, Any] = json.loads(run.record.read_text()) if run.record.is_file() else {}
    return found


def write_card(run: RunFolder) -> None:
    """The adapter's README.md, with the results that are known by now. The same run gives the same bytes."""
    record, config = read_record(run), load_config(run.config)
    if record:
        (run.adapter / "README.md").write_text(card(record, config, evaluations(run)), encoding="utf-8")


def evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """The summaries of what was evaluated, by split, without the adapter first."""
    found = [json.loads(path.read_text()) for path in sorted(run.path.glob("evaluation-*.json"))]
    return sorted(found, key=lambda one: (one["split"], one["adapter"]))


def card(record: dict[str, Any], config: Config, evaluated: list[dict[str, Any]]) -> str:
    """A model card in the hub's form."""
    cache, summary = record["cache"], record["summary"]
    base = config.model.checkpoint
    front = ["library_name: peft", "pipeline_tag: visual-question-answering", "tags: [blip-2, lora, vqa]"]
    if "/" in base and not Path(base).is_absolute():
        front.insert(0, f"base_model: {base}")
    validation = summary.get("validation", {})
    known = [_result(one) for one in evaluated]
    if "best_accuracy" in validation:
        known.append(
            f"| validation questions while training | {validation['best_accuracy']:.2f} | step "
            f"{validation['best_step']}, the best of {validation['looks']} |"
        )
    lines = [
        "---", *front, "---", "",
        f"# LoRA for visual question answering on {Path(base).name}", "",
        f"Rank {config.lora.r}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.target_modules)} of BLIP-2's "
        f"language model, {_precision(config)}.", "",
        "## Result", "", "| questions | VQA accuracy | |", "|---|---|---|",
        *(known or ["| none answered yet | | `pipe evaluate` |"]), "",
        f"{summary['steps']} steps of {config.train.batch_size} questions, seed {record['seed']}.", "",
        "## Data and features", "",
        f"Format {config.data.format}; {summary['questions']} training questions; prompt `{config.data.prompt}`.", "",
        "| the cache of features that it was trained from | |", "|---|---|",
        f"| fingerprint (`pipe cache info`) | `{cache['fingerprint']}` |",
        *(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in cache["spec"].items()),
        f"| pictures | {cache['images']} |",
        *(f"| SHA-256 of {split} {key} | `{digest}` |" for split, files in cache["sources"].items()
          for key, digest in files.items()), "",
        "## Versions", "", ", ".join(f"{name} {number}" for name, number in record["versions"].items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _precision(config: Config) -> str:
    quantization = config.quantization
    if quantization.bits is None:
        return "not quantised"
    double = ", double quantisation" if quantization.double_quant else ""
    return f"which was loaded in {quantization.bits} bits ({quantization.quant_type.upper()}{double})"


def _result(one: dict[str, Any]) -> str:
    who = "with the adapter" if one["adapter"] else "without it"
    accuracy, how = one["accuracy"], f"{one['method']}, {one['num_beams']} beams, {one['scored']} questions"
    if accuracy is None:
        return f"| {one['split']}, {who} | not known: no answers to compare | |"
    interval = one.get("accuracy_interval")
    reach = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"| {one['split']}, {who} | {accuracy:.2f}{reach} | {how} |"


def _write_json(record: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2))
    partial.replace(path)

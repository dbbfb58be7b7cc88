"""The whole job on what comes with the package: easy-VQA, the embedded checkpoint, no network."""

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train
from pipeline.common.progress import log_info
from pipeline.config import load_config
from pipeline.runs.run import next_run

CONFIG_NAME = "easy_vqa.yaml"


def quickstart(overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Precompute, evaluate, train, evaluate again; the summary of all four."""
    started = time.perf_counter()
    config_path = Path(str(files("pipeline.configs") / CONFIG_NAME))
    config = load_config(config_path, overrides)
    run = next_run(config.train.output_dir, config_path.stem)
    log_info("1/4 The frozen encoder runs once over every picture")
    encoded = precompute(config) or {}
    log_info("2/4 Training LoRA on the 4-bit language model, from the cache")
    trained = train(config, run) or {}
    log_info("3/4 Answering the test questions without the adapter")
    before = evaluate(run, with_adapter=False)
    log_info("4/4 Answering them with it")
    after = evaluate(run)
    return {
        "accuracy_before": before.accuracy,
        "accuracy": after.accuracy,
        "questions": after.questions,
        "precompute": _pick(encoded, "images", "encoded", "cache_bytes", "images_per_second", "seconds"),
        "train": _pick(trained, "questions", "steps", "seconds_training", "questions_per_second", "seconds"),
        "evaluate": _pick(after.to_dict(), "questions_per_second", "seconds"),
        "seconds": time.perf_counter() - started,
        "cache": encoded["cache"],
        "run": str(run.path),
        "adapter": str(run.adapter),
        "next": [
            f"pipe report {run.path}",
            f"pipe evaluate {run.path} --preset official",
            f"pipe train {run.config} lora.r=8 --name rank-8",
            "README.md, 'Your own data'",
        ],
    }


def _pick(summary: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: summary[key] for key in keys}

"""Runs all stages offline on the embedded checkpoint and easy-VQA."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.commands.evaluate import evaluate
from pipeline.commands.precompute import precompute
from pipeline.commands.train import train
from pipeline.common.progress import log_info
from pipeline.common.result import Result
from pipeline.config import load_config
from pipeline.runs.run import Run, next_run

CONFIG_NAME = "easy_vqa.yaml"


@dataclass(frozen=True)
class QuickstartResult(Result):
    """Result of `quickstart`."""

    accuracy_before: float | None
    """Accuracy on the test split without the adapter, 0 to 100."""
    accuracy: float | None
    """Accuracy with the adapter."""
    questions: int
    """Questions of the test split."""
    precompute: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    seconds: float
    cache: str
    run: str
    adapter: str
    next: list[str]
    """Commands to try next."""


def quickstart(overrides: Sequence[str] = ()) -> QuickstartResult | None:
    """Precompute, train, and evaluate without and with the adapter.

    Args:
        overrides: `key=value` overrides of the config.

    Returns:
        The result on rank 0, None elsewhere.
    """
    started = time.perf_counter()
    config_path = Path(str(files("pipeline.configs") / CONFIG_NAME))
    config = load_config(config_path, overrides)
    run = next_run(config.train.output_dir, config_path.stem)
    log_info("1/4 Encoding all images with the frozen encoder")
    encoded = precompute(config)
    log_info("2/4 Training LoRA on the 4-bit language model from the cache")
    trained = train(config, run.path.name)
    if encoded is None or trained is None:
        return None
    run = Run.of(trained)
    log_info("3/4 Evaluating without the adapter")
    before = evaluate(run, with_adapter=False)
    log_info("4/4 Evaluating with the adapter")
    after = evaluate(run)
    return QuickstartResult(
        accuracy_before=before.accuracy,
        accuracy=after.accuracy,
        questions=after.questions,
        precompute=_pick(encoded, "images", "encoded", "cache_bytes", "images_per_second", "seconds"),
        train=_pick(trained, "questions", "steps", "seconds_training", "questions_per_second", "seconds"),
        evaluate=_pick(after, "questions_per_second", "seconds"),
        seconds=time.perf_counter() - started,
        cache=encoded.cache,
        run=str(run.path),
        adapter=str(run.adapter),
        next=[
            f"pipe report {run.path}",
            f"pipe evaluate {run.path} --preset official",
            f"pipe train {run.config} lora.r=8 --name rank-8",
            "README.md, 'Your own data'",
        ],
    )


def _pick(result: Result, *keys: str) -> dict[str, Any]:
    return {key: getattr(result, key) for key in keys}

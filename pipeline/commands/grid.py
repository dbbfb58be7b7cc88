"""Several trainings from one command: every combination of the values that overrides list, the model loaded once."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.spec import CacheError
from pipeline.blip2.base_model import check_lora
from pipeline.blip2.language_model import Blip2LanguageHalf
from pipeline.commands.train import StoppedError, load_for_training, train
from pipeline.common.distributed import world_size
from pipeline.common.errors import PipelineError
from pipeline.common.progress import log_info
from pipeline.config import Config, load_config
from pipeline.runs.record import read_record
from pipeline.runs.run import Run

TOLD = ("steps", "train_loss", "best_accuracy", "questions_per_second", "seconds")


def train_grid(
    config: Path, combinations: Sequence[dict[str, str]], fixed: tuple[str, ...], base: Run, resume: bool = False
) -> dict[str, Any]:
    """Trains a run for each combination of overrides, in folders named after `base`; the summary of all.

    A run that fails does not stop the others. With `resume`, runs that are finished stay, others go on or begin.
    Raises `ConfigError` before anything is trained if one of the configs is wrong, `StoppedError` when told to stop.
    """
    if world_size() > 1:
        raise PipelineError("several trainings from one command run in one process: start them one by one, or not so")
    planned = [
        (run_of(base, varied), load_config(config, (*fixed, *(f"{key}={value}" for key, value in varied.items()))))
        for varied in combinations
    ]
    if not resume:
        for run, _ in planned:
            run.check_new()
    for _, settings in planned:
        check_lora(settings)
    load = _LoadOnce()
    rows = []
    for number, (varied, (run, settings)) in enumerate(zip(combinations, planned, strict=True), start=1):
        log_info(f"training {number} of {len(planned)}: {' '.join(f'{key}={value}' for key, value in varied.items())}")
        rows.append({"run": str(run.path), **varied, **_train_one(settings, run, resume, load)})
    return {"runs": rows, "failed_runs": sum("failed" in row for row in rows)}


def run_of(base: Run, varied: dict[str, str]) -> Run:
    """`base` with what is varied behind its name: mine-1-r=8-learning_rate=1e-4."""
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in varied.items()]
    name = "-".join([base.path.name, *words]).replace("/", "_").replace(" ", "")
    return Run(base.path.with_name(name))


def _train_one(config: Config, run: Run, resume: bool, load: "_LoadOnce") -> dict[str, Any]:
    """What is told of the run; why it failed, if it did."""
    started = time.perf_counter()
    try:
        if resume and run.adapter.is_dir():
            summary = read_record(run).get("summary", {})
        else:
            summary = train(config, run, resume and run.config.is_file(), load) or {}
    except StoppedError as error:
        stopped = str(error).partition(";")[0]
        raise StoppedError(f"{run.path}: {stopped}. The same command with --resume goes on with all runs") from None
    except (PipelineError, CacheError, OSError, RuntimeError) as error:
        load.forget()
        reason = str(error).splitlines()[0]
        log_info(f"{run.path} failed: {reason}")
        return {"failed": reason, "seconds": time.perf_counter() - started}
    known = {**summary, **summary.get("validation", {}), "seconds": summary.get("seconds", 0.0)}
    return {key: known[key] for key in TOLD if key in known}


class _LoadOnce:
    """The base model of the last training, without its adapter, while the next one asks for the same."""

    def __init__(self) -> None:
        self._key = ""
        self._model: Blip2LanguageHalf | None = None

    def __call__(self, config: Config) -> Blip2LanguageHalf:
        key = json.dumps(
            [config.model.model_dump(), config.quantization.model_dump(), config.train.dropout, config.lora.bias]
        )
        if self._model is None or key != self._key or config.lora.bias != "none":  # trained biases are the model's own
            self._model = None  # before the next one is loaded
            self._model, self._key = load_for_training(config), key
        return self._model

    def forget(self) -> None:
        """What a training that failed left of the model is not used again."""
        self._model = None

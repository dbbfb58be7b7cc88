"""Train a run for every combination of override values, and load the base model only once."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.spec import CacheError
from pipeline.blip2.base_model import check_lora
from pipeline.blip2.language_model import Blip2LanguageHalf
from pipeline.commands.train import StoppedError, load_for_training, resolve_run, train_run
from pipeline.common.distributed import world_size
from pipeline.common.errors import ConfigError, PipelineError
from pipeline.common.progress import log_info, log_warning
from pipeline.common.result import Result
from pipeline.config import Config, load_config
from pipeline.overrides import combinations_of
from pipeline.runs.record import read_record
from pipeline.runs.run import Run

SUMMARY_KEYS = ("steps", "train_loss", "best_accuracy", "questions_per_second", "seconds")
"""What is shown of each run's summary and of its validation."""


@dataclass(frozen=True)
class GridResult(Result):
    """The summary of a grid."""

    runs: list[dict[str, Any]]
    """For each run its folder, its values, and `SUMMARY_KEYS`, or `failed` with the reason."""
    failed_runs: int

    @property
    def exit_status(self) -> int:
        """Return 1 if a run failed."""
        return 1 if self.failed_runs else 0


def train_grid(source: Path, overrides: Sequence[str], name: str | None = None, resume: bool = False) -> GridResult:
    """Train a run for each combination of the values that `overrides` list.

    A run that fails does not stop the others.

    Args:
        source: the config.
        overrides: `key=value`, or `key=value,value` to vary a key.
        name: the common prefix of the run names; by default that of the config and the next free number.
        resume: keep finished runs, resume interrupted ones, and start the others; needs `name`.

    Returns:
        The summary.

    Raises:
        ConfigError: before any training, if `resume` is set without a name or a config is invalid.
        PipelineError: before any training, if a run exists already or there are several ranks.
        StoppedError: interrupted by Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    if world_size() > 1:
        raise PipelineError("several trainings cannot run under torchrun: start one command for each")
    if resume and not name:
        raise ConfigError("--resume of several trainings needs their --name")
    combinations, fixed = combinations_of(overrides, Config)
    _, base = resolve_run(source, fixed, name)
    planned = [(values, grid_run(base, values), _load(source, fixed, values)) for values in combinations]
    for _, run, config in planned:
        if not resume:
            run.check_new()
        check_lora(config)
    models = BaseModelCache()
    rows = []
    for number, (values, run, config) in enumerate(planned, start=1):
        log_info(f"Training {number} of {len(planned)}: {' '.join(_as_overrides(values))}")
        rows.append({"run": str(run.path), **values, **_train_one(config, run, resume, models)})
    return GridResult(runs=rows, failed_runs=sum("failed" in row for row in rows))


def grid_run(base: Run, values: dict[str, str]) -> Run:
    """Return the run named after `base` and the values, such as `mine-1-r=8-learning_rate=1e-4`."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
    name = "-".join([base.path.name, *parts]).replace("/", "_").replace(" ", "")
    return Run(base.path.with_name(name))


def _load(source: Path, fixed: Sequence[str], values: dict[str, str]) -> Config:
    return load_config(source, (*fixed, *_as_overrides(values)))


def _as_overrides(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _train_one(config: Config, run: Run, resume: bool, models: "BaseModelCache") -> dict[str, Any]:
    """Return the summary keys of one run, or why it failed."""
    started = time.perf_counter()
    try:
        summary = _finished_summary(run) if resume and run.adapter.is_dir() else None
        if summary is None:
            result = train_run(config, run, resume and run.config.is_file(), models)
            summary = result.to_dict() if result else {}
    except StoppedError as error:
        raise StoppedError(f"{error}; for all runs of the grid: rerun this command with --resume") from None
    except (PipelineError, CacheError, OSError, RuntimeError) as error:
        models.clear()
        reason = str(error).splitlines()[0]
        log_warning(f"{run.path} failed: {reason}")
        return {"failed": reason, "seconds": time.perf_counter() - started}
    values = {**summary, **summary.get("validation", {}), "seconds": summary.get("seconds", 0.0)}
    return {key: values[key] for key in SUMMARY_KEYS if key in values}


def _finished_summary(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = read_record(run).get("summary", {})
    return summary


class BaseModelCache:
    """Loads the base model of a training, and returns it again while the next ones need the same."""

    def __init__(self) -> None:
        """Start empty."""
        self._key = ""
        self._model: Blip2LanguageHalf | None = None

    def __call__(self, config: Config) -> Blip2LanguageHalf:
        """Return the base model of `config`."""
        key = json.dumps(
            [config.model.model_dump(), config.quantization.model_dump(), config.train.dropout, config.lora.bias]
        )
        if (
            self._model is None or key != self._key or config.lora.bias != "none"
        ):  # trained biases change the base model
            self._model = None  # free its memory before the next one is loaded
            self._model, self._key = load_for_training(config), key
        return self._model

    def clear(self) -> None:
        """Drop the model; a failed training may have left it modified."""
        self._model = None

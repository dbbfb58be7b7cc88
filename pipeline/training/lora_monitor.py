"""Record statistics of the LoRA weights during training, and warn about updates that differ from all others."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.common.progress import log_warning
from pipeline.runs.jsonl import append_jsonl, read_jsonl, write_jsonl
from pipeline.runs.run import Run
from pipeline.training.lora_statistics import Factors, find_anomalies, frozen_norm, measure
from pipeline.training.stopping import StopRequest

MATRICES_PER_CHUNK = 16
"""Matrices measured together: at rank 64 and width 2560 their float64 copies take about 150 MB."""
CHECKPOINT_FILE = "lora_monitor.safetensors"
"""In a checkpoint: the factors of the last measurement, if it was at an earlier step."""


class LoraMonitorCallback(TrainerCallback):
    """Record LoRA statistics every `steps` optimizer steps, the first and the last. Log each anomaly once.

    Only rank 0 measures, as all ranks have the same weights.
    """

    def __init__(self, model: PeftModel, run: Run, steps: int | None, warmup_steps: int, stop: StopRequest) -> None:
        """Set up the callback.

        Args:
            model: the model with its adapter.
            run: the run to log into.
            steps: the interval in optimizer steps; None disables monitoring.
            warmup_steps: the steps of the learning rate warmup.
            stop: no measurement is made when training is interrupted, as it is not the last step.
        """
        self.run, self.steps, self.warmup_steps, self.stop = run, steps, warmup_steps, stop
        self.layers = adapted_layers(model)
        self.adapter: str = model.active_adapter
        self.last_row: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.seconds = 0.0

    def summary(self) -> dict[str, Any]:
        """Return the ratios of the last measurement, all warnings, and the total time in seconds."""
        if not self.last_row:
            return {}
        ratios = {name: one["ratio"] for name, one in self.last_row["matrices"].items()}
        finite = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        largest = max(finite, key=lambda name: finite[name], default=None)
        return {
            "update_ratio_median": median(finite.values()) if finite else None,
            "update_ratio_largest": finite.get(largest) if largest else None,
            "largest": largest,
            "warnings": self.warnings,
            "seconds": self.seconds,
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the first step; on resume, restore the last measurement before the checkpoint."""
        if not self.steps or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        self.frozen_norms = {name: frozen_norm(layer) for name, layer in self.layers.items()}
        rows = read_jsonl(self.run.lora_updates, state.global_step)
        write_jsonl(self.run.lora_updates, rows)
        self.warnings = [warning for row in rows for warning in row["warnings"]]
        self.last_row = rows[-1] if rows else {}
        self.last_factors = self._copy_factors()
        saved = self._checkpoint_file(state)
        if self._is_due(state) and saved.exists():
            weights = load_file(saved, device=str(args.device))
            self.last_factors = {name: Factors(weights[f"{name}.b"], weights[f"{name}.a"]) for name in self.layers}
        elif self._is_due(state):
            self._record(state.global_step)
        self.seconds += time.perf_counter() - started

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure every `steps` steps, and after the last step."""
        if self.steps and (state.global_step % self.steps == 0 or state.global_step >= state.max_steps):
            self._record_if_due(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the factors of the last measurement, which the next one is compared with."""
        if self.steps and self._is_due(state):
            factors = {
                f"{name}.{key}": value
                for name, one in self.last_factors.items()
                for key, value in one._asdict().items()
            }
            save_file(factors, self._checkpoint_file(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the last step of a training that was stopped early, but not of an interrupted one."""
        if not self.stop.requested:
            self._record_if_due(state)

    def _record_if_due(self, state: TrainerState) -> None:
        if self.steps and self._is_due(state):
            started = time.perf_counter()
            self._record(state.global_step)
            self.seconds += time.perf_counter() - started

    def _is_due(self, state: TrainerState) -> bool:
        """Return whether this is rank 0 and the step is not measured yet."""
        return state.is_world_process_zero and self.last_row.get("step") != state.global_step

    def _checkpoint_file(self, state: TrainerState) -> Path:
        return self.run.checkpoints / f"checkpoint-{state.global_step}" / CHECKPOINT_FILE

    def _copy_factors(self) -> dict[str, Factors]:
        return {name: Factors(*(weight.clone() for weight in self._factors(name))) for name in self.layers}

    def _factors(self, name: str) -> Factors:
        layer = self.layers[name]
        return Factors(layer.lora_B[self.adapter].weight.detach(), layer.lora_A[self.adapter].weight.detach())

    def _record(self, step: int) -> None:
        """Measure all matrices, append the row, and log new warnings."""
        matrices = self._measure_all()
        warnings: list[str] = []
        if self.last_row:
            found = find_anomalies(
                matrices, self.last_row["matrices"], self.last_row["step"], after_warmup=step > self.warmup_steps
            )
            warnings = [warning for warning in found if not self._is_known(warning)]
        self.last_row = {"step": step, "matrices": matrices, "warnings": warnings}
        self.warnings += warnings
        self.last_factors = self._copy_factors()
        append_jsonl(self.run.lora_updates, self.last_row)
        for warning in warnings:
            log_warning(f"step {step}: {warning}")

    def _is_known(self, warning: str) -> bool:
        """Return whether the same anomaly of the same matrix was logged before."""
        return any(known.startswith(warning.partition(" since ")[0]) for known in self.warnings)

    def _measure_all(self) -> dict[str, dict[str, float | None]]:
        matrices: dict[str, dict[str, float | None]] = {}
        for names in _chunks_of_one_shape(self.last_factors):
            now = _stack(self._factors(name) for name in names)
            measured = measure(now, _stack(self.last_factors[name] for name in names))
            columns = {key: values.tolist() for key, values in measured.items()}
            for name, norm, rank, change in zip(names, *columns.values(), strict=True):
                scaling = self.layers[name].scaling[self.adapter]
                values = {
                    "norm": scaling * norm,
                    "ratio": scaling * norm / (self.frozen_norms[name] or math.nan),
                    "effective_rank": rank,
                    "change": scaling * change,
                }
                matrices[name] = {key: _round(value) for key, value in values.items()}
        return {name: matrices[name] for name in self.layers}


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers with an adapter by their names in the decoder, such as `layers.0.self_attn.q_proj`."""
    prefixes = ("base_model.model.", "language_model.model.decoder.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix(prefixes[0]).removeprefix(prefixes[1]): module for name, module in layers.items()}


def _chunks_of_one_shape(factors: Mapping[str, Factors]) -> Iterator[list[str]]:
    """Yield names of matrices of one shape, at most `MATRICES_PER_CHUNK` at a time."""
    by_shape: dict[Any, list[str]] = defaultdict(list)
    for name, (b, a) in factors.items():
        by_shape[b.shape, a.shape].append(name)
    for names in by_shape.values():
        yield from (names[start : start + MATRICES_PER_CHUNK] for start in range(0, len(names), MATRICES_PER_CHUNK))


def _stack(factors: Iterable[Factors]) -> Factors:
    return Factors(*map(torch.stack, zip(*factors, strict=True)))


def _round(value: float) -> float | None:
    """Return `value` with seven significant digits; None if it is not finite, which JSON cannot represent."""
    return float(f"{value:.7g}") if math.isfinite(value) else None

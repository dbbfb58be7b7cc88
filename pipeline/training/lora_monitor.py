"""Measure LoRA weights during training, and warn about updates that differ from all others.

d: width of a frozen matrix's output or input, r: the adapter's rank, n: adapted matrices of one shape.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.common.progress import log_warning
from pipeline.runs.jsonl import append_jsonl, read_jsonl, write_jsonl
from pipeline.runs.run import Run
from pipeline.training.stopping import StopRequest

MATRICES_PER_CHUNK = 16
"""Matrices measured together: at rank 64 and width 2560 their float64 copies take about 150 MB."""
OUTLIER_FACTOR = 10.0
"""An outlier's ratio is larger or smaller than the others' median by at least this factor."""
OUTLIER_DEVIATIONS = 6.0
"""An outlier is also this many robust standard deviations away, as the others may differ widely among themselves."""
MIN_DIVERGING_RATIO = 0.1
"""An update with a smaller ratio to its frozen weight never counts as diverging."""
MIN_RELATIVE_CHANGE = 1e-6
"""If no matrix changes by more than this fraction of its norm, as at a learning rate near 0, an unchanged matrix is
not an anomaly: float32 may round its change away."""
CHECKPOINT_FILE = "lora_monitor.safetensors"
"""In a checkpoint: the factors of the last measurement, if it was at an earlier step."""
ADVICE = {
    "is not finite": "the adapter is unusable; try a lower train.learning_rate",
    "is not changing": "little or no gradient may reach it; try a higher train.learning_rate, or remove it from "
    "lora.target_modules",
    "is diverging": "training may diverge; try a lower train.learning_rate, more train.warmup_steps, or remove it "
    "from lora.target_modules",
}
"""For each anomaly, its likely consequence and what to try."""

Measurement = Mapping[str, float | None]
"""`norm`, `ratio`, `effective_rank` and `change` of one matrix; None is not finite."""


class Factors(NamedTuple):
    """The LoRA factors of n updates B A, or of one without the dimension n."""

    b: Tensor
    """(n, d, r) or (d, r)"""
    a: Tensor
    """(n, r, d) or (r, d)"""


def measure(now: Factors, before: Factors) -> dict[str, Tensor]:
    """Return the norm, the effective rank and the change of each update, all (n,) float64.

    Norms are Frobenius norms, and the change is the norm of the difference to the update in `before`. No B A is formed:
    all results follow from r x r products, as ||B A||^2 is the trace of (B^T B) (A A^T). The change is computed as
    dB A + B' dA, where B' is the earlier factor and dB, dA are the differences of the factors, exact in float64. Its
    relative error stays near 1e-15 however small it is, whereas the difference of the traces of B A and B' A' would
    lose any change below 1e-8 of the norm. Where the two terms nearly cancel, leaving a fraction c of their size, the
    relative error grows by 1/c^2. Nonfinite updates give NaN.

    Args:
        now: the current factors.
        before: the factors of the previous measurement.
    """
    b, a = now.b.double(), now.a.double()
    b_before = before.b.double()
    db, da = b - b_before, a - before.a.double()
    left, right = b.mT @ b, a @ a.mT
    terms = (db.mT @ db) * right + 2 * (db.mT @ b_before) * (a @ da.mT) + (b_before.mT @ b_before) * (da @ da.mT)
    return {
        "norm": _root_of_sum(left * right),
        "effective_rank": effective_rank(left, right),
        "change": _root_of_sum(terms),
    }


def _root_of_sum(terms: Tensor) -> Tensor:
    return terms.sum((1, 2)).clamp(min=0).sqrt()


def effective_rank(left: Tensor, right: Tensor) -> Tensor:
    """Return the effective rank (n,) of B A: exp of the entropy of its normalized singular values.

    It is between 1 and r, and 0 for a zero update. Source: O. Roy and M. Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007. The squared singular values are the eigenvalues of B^T B A A^T. They are
    computed from the symmetric H^T A A^T H with H H^T = B^T B, accurate to 1e-16 of the largest, and the rank to about
    1e-6.

    Args:
        left: (n, r, r), B^T B.
        right: (n, r, r), A A^T.
    """
    finite = (left * right).sum((1, 2)).isfinite()
    left, right = (torch.where(finite[:, None, None], gram, 0.0) for gram in (left, right))
    values, vectors = torch.linalg.eigh(left)
    half = vectors * values.clamp(min=0).sqrt()[:, None]
    singular = torch.linalg.eigvalsh(half.mT @ right @ half).clamp(min=0).sqrt()
    total = singular.sum(1, keepdim=True)
    rank = torch.special.entr(singular / total).sum(1).exp()
    return torch.where(finite, torch.where(total[:, 0] > 0, rank, 0.0), torch.nan)


def find_anomalies(
    now: Mapping[str, Measurement], before: Mapping[str, Measurement], step_before: int, after_warmup: bool
) -> Iterator[str]:
    """Yield a warning per anomalous matrix, which starts with the name of the matrix and its anomaly.

    A matrix is compared with the others of its type (`q_proj` with `q_proj`) by the logarithm of its ratio, if there
    are at least three others. Their median absolute deviation, which a few outliers do not affect, gives the robust
    standard deviation. A matrix

    - `is not finite`;
    - `is not changing`: it is bit for bit that of the previous measurement while others change; or, after warmup, its
      ratio is far below the others';
    - `is diverging`: its ratio is far above the others', above `MIN_DIVERGING_RATIO`, and growing.

    Far is a factor of `OUTLIER_FACTOR`, and `OUTLIER_DEVIATIONS` robust standard deviations.

    Args:
        now: the current measurements by matrix name.
        before: those of the previous measurement.
        step_before: the step of the previous measurement.
        after_warmup: whether the learning rate has passed its warmup.
    """
    any_changing = any((one["change"] or 0) > MIN_RELATIVE_CHANGE * (one["norm"] or 0) for one in now.values())
    for name, one in now.items():
        kind = name.rpartition(".")[2]
        others = [row["ratio"] for other, row in now.items() if other != name and other.rpartition(".")[2] == kind]
        center, factor = _typical_range([ratio for ratio in others if ratio])
        anomaly = _anomaly(one, before[name], center, factor, any_changing, after_warmup)
        if anomaly:
            ratio = math.nan if one["ratio"] is None else one["ratio"]
            yield (
                f"{name} {anomaly} since step {step_before}: its update is {ratio:.2g} of the frozen weight, the "
                f"median of the other {kind} is {center:.2g}; {ADVICE[anomaly]}"
            )


def _anomaly(
    now: Measurement, before: Measurement, center: float, factor: float, any_changing: bool, after_warmup: bool
) -> str | None:
    ratio = now["ratio"]
    if ratio is None or now["change"] is None:
        return "is not finite"
    if (any_changing and now["change"] == 0) or (after_warmup and ratio * factor < center):
        return "is not changing"
    if ratio > max(center * factor, MIN_DIVERGING_RATIO) and ratio > (before["ratio"] or 0):
        return "is diverging"
    return None


def _typical_range(ratios: list[float]) -> tuple[float, float]:
    """Return the median, and the factor from it beyond which a ratio is an outlier; infinite for fewer than three."""
    if len(ratios) < 3:
        return median(ratios) if ratios else 0.0, math.inf
    logs = [math.log(ratio) for ratio in ratios]
    center = median(logs)
    deviation = 1.4826 * median(abs(log - center) for log in logs)  # the standard deviation of a normal distribution
    return math.exp(center), math.exp(max(math.log(OUTLIER_FACTOR), OUTLIER_DEVIATIONS * deviation))


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


def frozen_norm(layer: LoraLayer) -> float:
    """Return the Frobenius norm of the frozen weight; a 4-bit weight is dequantized temporarily."""
    weight = layer.get_base_layer().weight
    if isinstance(weight, Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


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

"""LoRA weights, watched while they are trained: how far each update has moved, and which moves unlike the others.

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

from pipeline.common.progress import log_info
from pipeline.runs.run import Run, append_row, read_jsonl, write_rows
from pipeline.training.stopping import StopRequest

AT_ONCE = 16
"""Matrices measured together: at rank 64 and width 2560 their float64 copies take some 150 MB."""
OUTLIER_FACTOR = 10.0
"""An update that is so many times the others' median, or a part of it, is out of the ordinary."""
DEVIATIONS = 6.0
"""And so many robust standard deviations away: where the others lie far apart themselves, one more is no news."""
MIN_DIVERGING_RATIO = 0.1
"""An update of less than this share of its frozen weight does not count as running away, however small the others."""
MIN_RELATIVE_CHANGE = 1e-6
"""Of the norm: where all changes are smaller, at a learning rate near 0, float32 may keep nothing of one of them."""
MEANINGS = {
    "is not finite": "the adapter is spoilt; try a lower train.learning_rate",
    "does not move": "perhaps little or no gradient reaches it; try a higher train.learning_rate, or leave it out of "
    "lora.target_modules",
    "runs away": "training may diverge; try a lower train.learning_rate, more train.warmup_steps, or leave it out of "
    "lora.target_modules",
}
"""Of what a matrix does: what it may mean, and what to try."""

Figures = Mapping[str, float | None]
"""Of one matrix: `norm`, `ratio`, `effective_rank`, `change`; None is not finite."""


class Factors(NamedTuple):
    """Of the updates B A."""

    b: Tensor
    """(n, d, r), or (d, r) of one matrix."""
    a: Tensor
    """(n, r, d), or (r, d) of one matrix."""


def measure(now: Factors, before: Factors) -> dict[str, Tensor]:
    """(n,) float64 each: `norm` of B A, its `effective_rank`, and `change`, the norm of its difference to `before`.

    Norms are Frobenius norms. No B A is formed: all follows from products of r x r, as ||B A||^2 is the trace of
    (B^T B) (A A^T). The change is dB A + B' dA, where B' is before and dB, dA are the factors' own differences, exact
    in float64. So its relative error stays near 1e-15 however small it is, where a difference of the traces of B A and
    B' A' leaves nothing of a change below 1e-8 of the norm. Only where the two terms cancel to a c-th part of what they
    are, it is c^2 times that. What is not finite is NaN.
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
    """(n,), of B^T B and A A^T (n, r, r): exp of the entropy of the singular values of B A, divided by their sum.

    Between 1 and r; 0 for an update of zero. Source: O. Roy and M. Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007. The squared singular values are the eigenvalues of B^T B A A^T; taken of
    the symmetric H^T A A^T H, with H H^T = B^T B, they are right to 1e-16 of the largest, and the rank to some 1e-6.
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
    matrices: Mapping[str, Figures], last: Mapping[str, Figures], since: int, warm: bool
) -> Iterator[str]:
    """What is out of the ordinary at a look, in words; each sentence begins with a matrix's name and what it does.

    A matrix is compared with the others of its kind (`q_proj` with `q_proj`), of which there must be three, by the
    logarithm of its ratio: with the others' median, in their median absolute deviations, which a few odd ones do not
    shift. What it does:

    - `is not finite`;
    - `does not move`: its update is to the last bit that of the look before, while others' change; or, after warm-up,
      its ratio lies far below the others';
    - `runs away`: its ratio lies far above the others', above `MIN_DIVERGING_RATIO`, and grows.

    Far is by a factor of `OUTLIER_FACTOR`, and by `DEVIATIONS` robust standard deviations.

    Args:
        matrices: the figures of this look.
        last: those of the look before.
        since: the step of the look before.
        warm: whether the learning rate has passed its warm-up.
    """
    moving = any((now["change"] or 0) > MIN_RELATIVE_CHANGE * (now["norm"] or 0) for now in matrices.values())
    for name, now in matrices.items():
        kind = name.rpartition(".")[2]
        others = [row["ratio"] for other, row in matrices.items() if other != name and other.rpartition(".")[2] == kind]
        middle, far = _spread([ratio for ratio in others if ratio])
        does = _verdict(now, last[name], middle, far, moving, warm)
        if does:
            ratio = math.nan if now["ratio"] is None else now["ratio"]
            yield (
                f"{name} {does} since step {since}: its update is {ratio:.2g} of the frozen weight, the median of the "
                f"other {kind} {middle:.2g}; {MEANINGS[does]}"
            )


def _verdict(now: Figures, before: Figures, middle: float, far: float, moving: bool, warm: bool) -> str | None:
    ratio = now["ratio"]
    if ratio is None or now["change"] is None:
        return "is not finite"
    if (moving and now["change"] == 0) or (warm and ratio * far < middle):
        return "does not move"
    if ratio > max(middle * far, MIN_DIVERGING_RATIO) and ratio > (before["ratio"] or 0):
        return "runs away"
    return None


def _spread(ratios: list[float]) -> tuple[float, float]:
    """The median, and the factor from it that is far; of fewer than three others nothing is."""
    if len(ratios) < 3:
        return median(ratios) if ratios else 0.0, math.inf
    logs = [math.log(ratio) for ratio in ratios]
    middle = median(logs)
    deviation = 1.4826 * median(abs(log - middle) for log in logs)  # of a normal distribution the standard deviation
    return math.exp(middle), math.exp(max(math.log(OUTLIER_FACTOR), DEVIATIONS * deviation))


class LoraMonitorCallback(TrainerCallback):
    """Record LoRA statistics every `steps` optimizer steps, the first and the last. Log each anomaly once.

    Process 0 alone looks: the weights are the same in all. `steps` None never does.
    """

    def __init__(self, model: PeftModel, run: Run, steps: int | None, warmup_steps: int, stop: StopRequest) -> None:
        self.run, self.steps, self.warmup_steps, self.stop = run, steps, warmup_steps, stop
        self.layers = adapted_layers(model)
        self.adapter: str = model.active_adapter
        self.last: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.seconds = 0.0

    def summary(self) -> dict[str, Any]:
        """Of the last look the ratios; all that was told; the time that it took."""
        if not self.last:
            return {}
        ratios = {name: figures["ratio"] for name, figures in self.last["matrices"].items()}
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
        if not self.steps or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        self.frozen = {name: frozen_norm(layer) for name, layer in self.layers.items()}
        rows = read_jsonl(state.global_step, self.run.watch)
        write_rows(rows, self.run.watch)
        self.warnings = [sentence for row in rows for sentence in row["warnings"]]
        self.last = rows[-1] if rows else {}
        self.seen = self._factors()
        kept = self._kept(state)
        if self._is_due(state) and kept.exists():
            weights = load_file(kept, device=str(args.device))
            self.seen = {name: Factors(weights[f"{name}.b"], weights[f"{name}.a"]) for name in self.layers}
        elif self._is_due(state):
            self._look(state.global_step)
        self.seconds += time.perf_counter() - started

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps and (state.global_step % self.steps == 0 or state.global_step >= state.max_steps):
            self._look_if_due(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Between two looks a checkpoint takes the factors of the first, which the second is compared with."""
        if self.steps and self._is_due(state):
            seen = {f"{name}.{key}": value for name, one in self.seen.items() for key, value in one._asdict().items()}
            save_file(seen, self._kept(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last look, unless the training is to go on later."""
        if not self.stop.made:
            self._look_if_due(state)

    def _look_if_due(self, state: TrainerState) -> None:
        if self.steps and self._is_due(state):
            started = time.perf_counter()
            self._look(state.global_step)
            self.seconds += time.perf_counter() - started

    def _is_due(self, state: TrainerState) -> bool:
        """Whether this step was not looked at yet, and this process is the one to."""
        return state.is_world_process_zero and self.last.get("step") != state.global_step

    def _kept(self, state: TrainerState) -> Path:
        return self.run.checkpoints / f"checkpoint-{state.global_step}" / "watched.safetensors"

    def _factors(self) -> dict[str, Factors]:
        """Copies of the weights."""
        return {name: Factors(*(weight.clone() for weight in self._weights(name))) for name in self.layers}

    def _weights(self, name: str) -> Factors:
        layer = self.layers[name]
        return Factors(layer.lora_B[self.adapter].weight.detach(), layer.lora_A[self.adapter].weight.detach())

    def _look(self, step: int) -> None:
        matrices = self._measure()
        found = (
            find_anomalies(matrices, self.last["matrices"], self.last["step"], step > self.warmup_steps)
            if self.last
            else ()
        )
        warnings = [sentence for sentence in found if not self._is_old(sentence)]
        self.last = {"step": step, "matrices": matrices, "warnings": warnings}
        self.warnings += warnings
        self.seen = self._factors()
        append_row(self.last, self.run.watch)
        for sentence in warnings:
            log_info(f"step {step}: {sentence}")

    def _is_old(self, sentence: str) -> bool:
        """Whether the same was said of the same matrix, with whatever figures."""
        return any(old.startswith(sentence.partition(" since ")[0]) for old in self.warnings)

    def _measure(self) -> dict[str, dict[str, float | None]]:
        matrices: dict[str, dict[str, float | None]] = {}
        for names in _alike(self.seen):
            now = _stacked(self._weights(name) for name in names)
            measured = measure(now, _stacked(self.seen[name] for name in names))
            columns = {key: values.tolist() for key, values in measured.items()}
            for name, norm, rank, change in zip(names, *columns.values(), strict=True):
                scaling = self.layers[name].scaling[self.adapter]
                figures = {
                    "norm": scaling * norm,
                    "ratio": scaling * norm / (self.frozen[name] or math.nan),
                    "effective_rank": rank,
                    "change": scaling * change,
                }
                matrices[name] = {key: _rounded(value) for key, value in figures.items()}
        return {name: matrices[name] for name in self.layers}


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers that have an adapter, by their names in the decoder: `layers.0.self_attn.q_proj`."""
    prefixes = ("base_model.model.", "language_model.model.decoder.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix(prefixes[0]).removeprefix(prefixes[1]): module for name, module in layers.items()}


def frozen_norm(layer: LoraLayer) -> float:
    """Frobenius norm of the weight under an adapter; a 4-bit one is unpacked for it and dropped."""
    weight = layer.get_base_layer().weight
    if isinstance(weight, Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


def _alike(factors: Mapping[str, Factors]) -> Iterator[list[str]]:
    """Names of matrices of one shape, not too many at a time."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, (b, a) in factors.items():
        groups[b.shape, a.shape].append(name)
    for names in groups.values():
        yield from (names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE))


def _stacked(factors: Iterable[Factors]) -> Factors:
    return Factors(*map(torch.stack, zip(*factors, strict=True)))


def _rounded(value: float) -> float | None:
    """Seven digits; None where it is not finite, which JSON cannot say."""
    return float(f"{value:.7g}") if math.isfinite(value) else None

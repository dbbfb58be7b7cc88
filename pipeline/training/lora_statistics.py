"""Statistics of LoRA updates, and which of them are anomalies.

d: width of a frozen matrix's output or input, r: the adapter's rank, n: adapted matrices of one shape.
"""

import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor

OUTLIER_FACTOR = 10.0
"""An outlier's ratio is larger or smaller than the others' median by at least this factor."""
OUTLIER_DEVIATIONS = 6.0
"""An outlier is also this many robust standard deviations away, as the others may differ widely among themselves."""
MIN_DIVERGING_RATIO = 0.1
"""An update with a smaller ratio to its frozen weight never counts as diverging."""
MIN_RELATIVE_CHANGE = 1e-6
"""If no matrix changes by more than this fraction of its norm, as at a learning rate near 0, an unchanged matrix is
not an anomaly: float32 may round its change away."""
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


def frozen_norm(layer: LoraLayer) -> float:
    """Return the Frobenius norm of the frozen weight; a 4-bit weight is dequantized temporarily."""
    weight = layer.get_base_layer().weight
    if isinstance(weight, Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


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

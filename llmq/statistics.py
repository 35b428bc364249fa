"""Standard errors, paired intervals and verdicts. Pure: numbers in, numbers out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from llmq.types import Measurement, Samples

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "same", "undecided"]
RESAMPLES = 5000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """One figure of a stage against the same figure of another."""

    task: str
    metric: str
    difference: float
    ratio: float | None
    ci95: Interval | None
    ratio_ci95: Interval | None
    verdict: Verdict


def compare(stage: Measurement, base: Measurement, seed: int = 0) -> Comparison:
    """Difference, ratio, their 95 % intervals by paired bootstrap, and the verdict that the interval allows."""
    difference = stage.value - base.value
    ratio = stage.value / base.value if base.value else None
    ci = ratio_ci = None
    if stage.samples and base.samples:
        ci, ratio_ci = paired_intervals(stage.samples, base.samples, seed)
    elif stage.stderr == base.stderr == 0:  # an exact figure, such as a size
        ci, ratio_ci = (difference, difference), (ratio, ratio) if ratio is not None else None
    return Comparison(stage.task, stage.metric, difference, ratio, ci, ratio_ci, verdict(ci, stage.better))


def verdict(ci: Interval | None, better: str) -> Verdict:
    """What an interval of the difference lets one say."""
    if ci is None:
        return "undecided"
    low, high = ci
    if not (isfinite(low) and isfinite(high)):
        return "undecided"
    if low == high == 0:
        return "same"
    if low <= 0 <= high:
        return "undecided"
    return "better" if (low > 0) == (better == "higher") else "worse"


def paired_intervals(a: Samples, b: Samples, seed: int = 0) -> tuple[Interval | None, Interval | None]:
    """95 % intervals of `figure(a) - figure(b)` and of their ratio, resampling the pairs.

    BCa bootstrap (Efron 1987). Raises `ValueError` if the samples are not of the same questions.
    """
    if len(a.values) != len(b.values) or (a.statistic, a.quantile) != (b.statistic, b.quantile):
        raise ValueError(f"samples do not pair: {len(a.values)} {a.statistic} against {len(b.values)} {b.statistic}")

    def difference(rows: Any) -> Any:
        return figure(a, rows) - figure(b, rows)

    def ratio(rows: Any) -> Any:
        return figure(a, rows) / figure(b, rows)

    n = len(a.values)
    if a.values == b.values and a.weights == b.weights:
        return (0.0, 0.0), (1.0, 1.0)
    if n < 2:
        return None, None
    if _is_binary(a) and _is_binary(b):
        return paired_proportions(a.values, b.values), None
    low_high = bca(difference, n, seed)
    everything = np.arange(n)[None]
    safe = np.all(np.asarray(b.values) > 0) and float(figure(b, everything)[0]) > 0
    return low_high, bca(ratio, n, seed) if safe else None


def _is_binary(samples: Samples) -> bool:
    return samples.statistic == "mean" and samples.weights is None and set(samples.values) <= {0.0, 1.0}


def paired_proportions(a: Sequence[float], b: Sequence[float]) -> Interval:
    """95 % interval of the difference of two shares of right answers to the same questions.

    Agresti & Min 2005, eq. 4: half a question is added to each cell of the table. A bootstrap would be sure of a
    difference as soon as the few answers that changed all changed the same way.
    """
    gained = sum(x > y for x, y in zip(a, b, strict=True)) + 0.5
    lost = sum(x < y for x, y in zip(a, b, strict=True)) + 0.5
    n = len(a) + 2
    difference = (gained - lost) / n
    spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * (gained + lost - n * difference**2) ** 0.5 / n
    return difference - spread, difference + spread


def figure(samples: Samples, rows: Any = None) -> Any:
    """The figure that samples make; with `rows` (resamples, n) of indices, one figure for each resample."""
    values = np.asarray(samples.values, dtype=np.float64)
    rows = np.arange(len(values))[None] if rows is None else rows
    if samples.statistic == "quantile":
        return np.quantile(values[rows], samples.quantile, axis=1)
    weights = np.ones_like(values) if samples.weights is None else np.asarray(samples.weights, dtype=np.float64)
    mean = values[rows].sum(1) / weights[rows].sum(1)
    return np.exp(mean) if samples.statistic == "exp" else mean


def bca(statistic: Callable[[Any], Any], n: int, seed: int) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of `statistic(rows)` over `n` samples."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // n)
    parts = [min(chunk, RESAMPLES - i) for i in range(0, RESAMPLES, chunk)]
    resampled = np.sort(np.concatenate([statistic(rng.integers(0, n, (k, n))) for k in parts]))
    observed = float(statistic(np.arange(n)[None])[0])
    normal = NormalDist()
    below = (np.sum(resampled < observed) + 0.5 * np.sum(resampled == observed)) / RESAMPLES
    bias = normal.inv_cdf(float(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES)))
    acceleration = _acceleration(statistic, n)
    ends = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(resampled, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def _acceleration(statistic: Callable[[Any], Any], n: int) -> float:
    keep = min(n, 400)  # the skewness of the jackknife needs no more, and its cost grows with n squared
    left_out = np.linspace(0, n - 1, keep).astype(int)
    rows = np.arange(n - 1)[None] + (np.arange(n - 1)[None] >= left_out[:, None])
    jackknife = np.concatenate([statistic(r) for r in np.array_split(rows, max(1, keep * n // 4_000_000))])
    spread = jackknife.mean() - jackknife
    total = float(np.sum(spread**2))
    return float(np.sum(spread**3)) / (6 * total**1.5) if total > 0 else 0.0


def ratio_stderr(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float | None]:
    """The sum of values over the sum of weights, and its standard error (ratio estimator, linearised)."""
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(v.sum() / w.sum())
    if len(v) < 2:
        return mean, None
    n = len(v)
    return mean, float(np.sqrt(n / (n - 1) * np.sum((v - mean * w) ** 2)) / w.sum())


def quantile_stderr(values: Sequence[float], quantile: float = 0.5) -> tuple[float, float | None]:
    """A quantile and its bootstrap standard error."""
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 2:
        return float(v[0]), None
    rows = np.random.default_rng(0).integers(0, len(v), (1000, len(v)))
    return float(np.quantile(v, quantile)), float(np.quantile(v[rows], quantile, axis=1).std(ddof=1))

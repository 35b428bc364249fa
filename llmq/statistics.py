"""Standard errors, paired estimates and verdicts. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, isfinite, log
from typing import Any, Literal

import numpy as np

from llmq import power, proportions
from llmq.proportions import Table
from llmq.resampling import (
    EXP,
    LEVEL,
    LOG,
    PLAIN,
    Contrast,
    Interval,
    Mean,
    Resampled,
    Scale,
    quantile_spread,
    t_quantile,
    t_two_sided,
)
from llmq.types import Measurement, Samples

Verdict = Literal["better", "worse", "same", "undecided"]
ALPHA = 1 - LEVEL


@dataclass(frozen=True)
class Estimate:
    """A figure that samples make, alone or beside a base, and its 95 % interval.

    `stderr` is that of the figure, or with `log` that of its logarithm. `p` is that of no difference.
    """

    value: float
    low: float
    high: float
    stderr: float
    n: int
    log: bool = False
    p: float | None = None

    @property
    def interval(self) -> Interval:
        """Both ends."""
        return self.low, self.high

    def needed(self, bound: float) -> int | None:
        """How many samples would tell on which side of `bound` the figure lies, if it is where it was seen."""
        inside = not self.log or (self.value > 0 and bound > 0)
        margin = (log(self.value / bound) if self.log else self.value - bound) if inside else float("nan")
        return power.needed(self.stderr, self.n, margin)


@dataclass(frozen=True)
class Comparison:
    """One figure of a stage against the same figure of another.

    `p` is that of no difference; `p_holm` is corrected for all comparisons of the table, which the verdict heeds.
    `detectable` is the smallest difference that so many samples see with 80 % power, `needed` how many would see the
    one that was found.
    """

    task: str
    metric: str
    difference: float
    ratio: float | None
    ci95: Interval | None
    ratio_ci95: Interval | None
    verdict: Verdict
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    needed: int | None = None


def compare(stage: Measurement, base: Measurement, seed: int = 0) -> Comparison:
    """Difference, ratio, their 95 % intervals from the pairs, and the verdict that the interval allows."""
    off, ratio_value = stage.value - base.value, stage.value / base.value if base.value else None
    plain = Comparison(stage.task, stage.metric, off, ratio_value, None, None, "undecided")
    if stage.samples and base.samples:
        found, times = difference(stage.samples, base.samples, seed), ratio(stage.samples, base.samples, seed)
        if not found:
            return plain
        identical = stage.samples.values == base.samples.values and stage.samples.weights == base.samples.weights
        return replace(
            plain,
            ci95=found.interval,
            ratio_ci95=times.interval if times else None,
            verdict="same" if identical else verdict(found.interval, stage.better),
            p=found.p,
            detectable=power.detectable(found.stderr),
            needed=found.needed(0.0),
        )
    if stage.stderr == base.stderr == 0:  # an exact figure, such as a size
        ci, ratio_ci = (off, off), (ratio_value, ratio_value) if ratio_value is not None else None
        return replace(plain, ci95=ci, ratio_ci95=ratio_ci, verdict=verdict(ci, stage.better))
    return plain


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


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one table, their verdicts corrected for there being several (Holm). Exact ones need none."""
    tested = [c for c in comparisons if c.p is not None]
    adjusted = dict(zip(map(id, tested), power.holm([c.p for c in tested if c.p is not None]), strict=True))

    def corrected_one(c: Comparison) -> Comparison:
        p = adjusted.get(id(c))
        doubtful = p is not None and p >= ALPHA and c.verdict in ("better", "worse")
        return replace(c, p_holm=p, verdict="undecided" if doubtful else c.verdict)

    return [corrected_one(c) for c in comparisons]


def paired_intervals(a: Samples, b: Samples, seed: int = 0) -> tuple[Interval | None, Interval | None]:
    """95 % intervals of `figure(a) - figure(b)` and of their ratio. Raises `ValueError` if the samples do not pair."""
    found, times = difference(a, b, seed), ratio(a, b, seed)
    return found.interval if found else None, times.interval if times else None


def difference(a: Samples, b: Samples, seed: int = 0) -> Estimate | None:
    """`figure(a) - figure(b)`. Raises `ValueError` if the samples are not of the same questions."""
    _check_pairs(a, b)
    n, value = len(a.values), float(figure(a)[0] - figure(b)[0])
    if _is_binary(a) and _is_binary(b) and not a.clusters:
        if n < 2:
            return None
        table = Table.of(a.values, b.values)
        stderr, (low, high) = proportions.difference(table)
        return Estimate(value, low, high, stderr, n, p=proportions.mcnemar(table))
    if a.values == b.values and a.weights == b.weights:
        return Estimate(0.0, 0.0, 0.0, 0.0, n)
    if a.statistic == "quantile":
        return _spread(a, lambda rows: figure(a, rows) - figure(b, rows), value, seed)
    found = _contrast(EXP if a.statistic == "exp" else PLAIN, seed, a, b)
    return Estimate(value, found.low, found.high, found.stderr, n, p=found.p) if found else None


def ratio(a: Samples, b: Samples, seed: int = 0) -> Estimate | None:
    """`figure(a) / figure(b)` of samples none of which is negative; `None` where the base may be 0."""
    _check_pairs(a, b)
    n = len(a.values)
    if _is_binary(a) and _is_binary(b) and not a.clusters:
        table = Table.of(a.values, b.values)
        if n < 2 or not sum(b.values):
            return None
        stderr, (low, high) = proportions.ratio(table)
        return Estimate(sum(a.values) / sum(b.values), low, high, stderr, n, log=True, p=proportions.mcnemar(table))
    if a.values == b.values and a.weights == b.weights:
        return Estimate(1.0, 1.0, 1.0, 0.0, n, log=True)
    if a.statistic != "exp" and (min(a.values) < 0 or min(b.values) < 0):
        return None
    if a.statistic == "quantile":
        if min(a.values) <= 0 or min(b.values) <= 0:
            return None
        value = float(np.log(figure(a)[0] / figure(b)[0]))
        return _exponential(_spread(a, lambda rows: np.log(figure(a, rows) / figure(b, rows)), value, seed))
    found = _contrast(PLAIN if a.statistic == "exp" else LOG, seed, a, b)
    return _exponential(Estimate(found.value, found.low, found.high, found.stderr, n, p=found.p)) if found else None


def alone(a: Samples, seed: int = 0) -> Estimate | None:
    """The figure of one stage."""
    n, value = len(a.values), float(figure(a)[0])
    if n < 2:
        return None
    if _is_binary(a) and not a.clusters:
        low, high = proportions.wilson(int(sum(a.values)), n)
        return Estimate(value, low, high, (high - low) / (2 * proportions.Z), n)
    if a.statistic == "quantile":
        return _spread(a, lambda rows: figure(a, rows), value, seed)
    found = _contrast(PLAIN, seed, a)
    plain = Estimate(found.value, found.low, found.high, found.stderr, n) if found else None
    return _exponential(plain) if a.statistic == "exp" else plain


def _check_pairs(a: Samples, b: Samples) -> None:
    if len(a.values) != len(b.values) or (a.statistic, a.quantile) != (b.statistic, b.quantile):
        raise ValueError(f"samples do not pair: {len(a.values)} {a.statistic} against {len(b.values)} {b.statistic}")
    if a.clusters != b.clusters:
        raise ValueError("samples do not pair: they share their documents in other ways")


def _exponential(e: Estimate | None) -> Estimate | None:
    return Estimate(exp(e.value), exp(e.low), exp(e.high), e.stderr, e.n, log=True, p=e.p) if e else None


def _is_binary(samples: Samples) -> bool:
    return samples.statistic == "mean" and samples.weights is None and set(samples.values) <= {0.0, 1.0}


def _contrast(scale: Scale, seed: int, *sides: Samples) -> Contrast | None:
    resampled = _resampled(seed, *sides)
    return resampled.contrast(scale) if resampled else None


@lru_cache(maxsize=1)  # a difference and a ratio are taken of the same pairs, one after the other
def _resampled(seed: int, *sides: Samples) -> Resampled | None:
    means = [Mean(*_rows(s), sign) for s, sign in zip(sides, (1.0, -1.0), strict=False)]
    return Resampled(means, seed) if len(means[0].values) > 1 else None


def _rows(samples: Samples) -> tuple[Any, Any]:
    """Values and weights, summed over the samples of one document where they share it."""
    values, weights = np.asarray(samples.values, dtype=np.float64), _weights(samples)
    if samples.clusters is None:
        return values, weights
    _, which = np.unique(samples.clusters, return_inverse=True)
    return np.bincount(which, values), np.bincount(which, weights)


def _weights(samples: Samples) -> Any:
    given = samples.weights
    return np.ones(len(samples.values)) if given is None else np.asarray(given, dtype=np.float64)


def _spread(a: Samples, figures: Any, value: float, seed: int) -> Estimate | None:
    """A t interval about a quantile. Where not one sample lies beyond the quantile, nothing is known of its scatter."""
    n = len(a.values)
    if n < 3 or n * min(a.quantile, 1 - a.quantile) < 1:
        return None
    stderr = quantile_spread(figures, n, seed)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * stderr
    p = t_two_sided(value / stderr, n - 1) if stderr else float(value == 0)
    return Estimate(value, value - half, value + half, stderr, n, p=p)


def figure(samples: Samples, rows: Any = None) -> Any:
    """The figure that samples make; with `rows` (resamples, n) of indices, one figure for each resample."""
    values = np.asarray(samples.values, dtype=np.float64)
    rows = np.arange(len(values))[None] if rows is None else rows
    if samples.statistic == "quantile":
        return np.quantile(values[rows], samples.quantile, axis=1)
    mean = values[rows].sum(1) / _weights(samples)[rows].sum(1)
    return np.exp(mean) if samples.statistic == "exp" else mean


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
    return float(np.quantile(v, quantile)), quantile_spread(
        lambda rows: np.quantile(v[rows], quantile, axis=1), len(v), 0
    )

"""A figure that samples make, alone or beside a base, with its interval. Pure: numbers in, numbers out."""

from dataclasses import dataclass
from functools import lru_cache
from math import exp, log
from statistics import NormalDist
from typing import Any

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


def unpaired(a: Measurement, b: Measurement, *, as_ratio: bool = False) -> Estimate | None:
    """A difference or ratio of figures whose standard errors alone are known.

    Of answers to the same questions it is wider than need be, for such answers err together.
    """
    n = min(a.n, b.n)
    if a.stderr is None or b.stderr is None or (as_ratio and min(a.value, b.value) <= 0):
        return None
    if as_ratio:
        stderr = ((a.stderr / a.value) ** 2 + (b.stderr / b.value) ** 2) ** 0.5
        return _exponential(_normal(log(a.value / b.value), stderr, n))
    return _normal(a.value - b.value, (a.stderr**2 + b.stderr**2) ** 0.5, n)


def by_stderr(a: Measurement) -> Estimate | None:
    """A figure whose standard error alone is known."""
    return None if a.stderr is None else _normal(a.value, a.stderr, a.n)


def _normal(value: float, stderr: float, n: int) -> Estimate:
    half = proportions.Z * stderr
    p = 2 * NormalDist().cdf(-abs(value) / stderr) if stderr else float(value == 0)
    return Estimate(value, value - half, value + half, stderr, n, p=p)

"""Figures with standard errors, built out of samples. Pure: numbers in, numbers out."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from llmq.statistics.resampling import cluster_spread, quantile_spread
from llmq.types import Better, Measurement, Samples


def exact(task: str, metric: str, value: float, unit: str, better: Better, convention: str) -> Measurement:
    """A figure that was counted, not sampled."""
    return Measurement(task, metric, value, unit, better, 1, 0.0, convention, exact=True)


def mean(
    task: str,
    metric: str,
    values: Sequence[float],
    unit: str,
    better: Better,
    convention: str,
    ids: tuple[str, ...] | None = None,
    clusters: tuple[int, ...] | None = None,
) -> Measurement:
    """The mean of one value a sample."""
    value, stderr = ratio_stderr(values, clusters=clusters)
    samples = Samples(tuple(values), ids=ids, clusters=clusters)
    return Measurement(task, metric, value, unit, better, len(values), stderr, convention, samples)


def share(task: str, metric: str, values: Sequence[float], unit: str, better: Better, convention: str) -> Measurement:
    """The mean of answers that are 0 or 1; where all are alike the standard error is not 0 (Agresti & Min 2005)."""
    n = len(values)
    shrunk = (sum(values) + 0.5) / (n + 1)  # half an answer added to each side
    stderr = float(np.sqrt(shrunk * (1 - shrunk) / n))
    return Measurement(task, metric, sum(values) / n, unit, better, n, stderr, convention, Samples(tuple(values)))


def ratio(
    task: str,
    metric: str,
    values: Sequence[float],
    weights: Sequence[float],
    unit: str,
    better: Better,
    convention: str,
    exponential: bool = False,
    clusters: tuple[int, ...] | None = None,
) -> Measurement:
    """The sum of `values` over the sum of `weights`, or the exponential of that ratio, such as a perplexity."""
    value, stderr = ratio_stderr(values, weights, clusters)
    samples = Samples(tuple(values), tuple(map(float, weights)), "exp" if exponential else "mean", clusters=clusters)
    if exponential:
        value = float(np.exp(value))
        stderr = None if stderr is None else value * stderr  # to first order
    return Measurement(task, metric, value, unit, better, len(values), stderr, convention, samples)


def stretches(n: int) -> tuple[int, ...]:
    """The clusters of `n` neighbours, such as slices of a volume: 8 to 20 stretches, of 16 neighbours between these.

    Neighbours are alike: on 30 and 90 slices of a real scan they correlate by 0.85 and 0.98, and the standard error of
    slices taken one by one is a half to a third of that over 10 stretches.
    """
    count = min(n, max(8, min(20, n // 16)))
    return tuple(i * count // n for i in range(n))


def repeats(questions: Sequence[Hashable]) -> tuple[int, ...] | None:
    """The clusters of samples that answer one question each; None where fewer than a tenth repeat one.

    So few widen no interval by more than a twentieth, and shares of single answers have an interval of their own.
    """
    first: dict[Hashable, int] = {}
    clusters = tuple(first.setdefault(question, len(first)) for question in questions)
    return clusters if len(first) < 0.9 * len(clusters) else None


def ratio_stderr(
    values: Sequence[float], weights: Sequence[float] | None = None, clusters: Sequence[int] | None = None
) -> tuple[float, float | None]:
    """The sum of values over the sum of weights, and the standard error (ratio estimator, linearised).

    With `clusters` whole clusters are independent, and not their values.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(v.sum() / w.sum())
    if clusters is not None:
        _, which = np.unique(clusters, return_inverse=True)
        v, w = np.bincount(which, v), np.bincount(which, w)
    if len(v) < 2:
        return mean, None
    n = len(v)
    return mean, float(np.sqrt(n / (n - 1) * np.sum((v - mean * w) ** 2)) / w.sum())


def quantile_stderr(
    values: Sequence[float], quantile: float = 0.5, clusters: Sequence[int] | None = None
) -> tuple[float, float | None]:
    """A quantile and its bootstrap standard error; with `clusters` whole clusters are drawn."""
    v = np.asarray(values, dtype=np.float64)
    value = float(np.quantile(v, quantile))
    if len(v if clusters is None else set(clusters)) < 2:
        return value, None

    def figures(rows: Any) -> Any:
        return np.quantile(v[rows], quantile, axis=1)

    return value, quantile_spread(figures, len(v), 0) if clusters is None else cluster_spread(figures, clusters, 0)

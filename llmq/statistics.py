"""Standard errors, paired estimates and verdicts. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np

from llmq import power
from llmq.estimates import difference, ratio
from llmq.resampling import LEVEL, Interval, quantile_spread
from llmq.types import Measurement, Samples

Verdict = Literal["better", "worse", "same", "undecided"]
ALPHA = 1 - LEVEL


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

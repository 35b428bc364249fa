"""Standard errors, paired estimates and verdicts. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np

from llmq import power
from llmq.estimates import FEWEST, difference, figure, ratio
from llmq.pairing import Pairs, pairs
from llmq.resampling import LEVEL, Interval, quantile_spread
from llmq.types import Better, Measurement, Samples

Verdict = Literal["better", "worse", "same", "undecided", "unknown"]
"""`unknown`: the figure's direction is not known, so that neither is better."""
ALPHA = 1 - LEVEL


@dataclass(frozen=True)
class Comparison:
    """One figure of a stage against the same figure of another.

    Of samples that name their documents the difference, the ratio and `n` are those of what both stages scored;
    `only_stage` and `only_base` count what was left out. `p` is that of no difference; `p_holm` is corrected for all
    comparisons of the table, which the verdict heeds. `detectable` is the smallest difference that so many samples see
    with 80 % power, `needed` how many would see the one that was found. `reason` says why nothing was decided, where
    that is not the interval.
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
    n: int | None = None
    only_stage: int = 0
    only_base: int = 0
    reason: str = ""


def compare(stage: Measurement, base: Measurement, seed: int = 0) -> Comparison:
    """Difference, ratio, their 95 % intervals from the pairs, and the verdict that the interval allows."""
    off, ratio_value = stage.value - base.value, stage.value / base.value if base.value else None
    plain = Comparison(stage.task, stage.metric, off, ratio_value, None, None, verdict(None, stage.better))
    if stage.exact and base.exact:
        ci, ratio_ci = (off, off), (ratio_value, ratio_value) if ratio_value is not None else None
        return replace(plain, ci95=ci, ratio_ci95=ratio_ci, verdict=verdict(ci, stage.better))
    if not (stage.samples and base.samples):
        return plain
    try:
        paired = pairs(stage.samples, base.samples)
    except ValueError as error:
        return replace(plain, reason=str(error))
    return _of_pairs(plain, paired, stage.better, seed)


def _of_pairs(plain: Comparison, paired: Pairs, better: Better, seed: int) -> Comparison:
    a, b = paired.stage, paired.base
    plain = replace(plain, n=paired.n, only_stage=paired.only_stage, only_base=paired.only_base)
    if paired.only_stage or paired.only_base:  # the figures of all documents are not of the same ones
        value, base_value = float(figure(a)[0]), float(figure(b)[0])
        plain = replace(plain, difference=value - base_value, ratio=value / base_value if base_value else None)
    found, times = difference(a, b, seed), ratio(a, b, seed)
    if found:
        plain = replace(
            plain,
            ci95=found.interval,
            ratio_ci95=times.interval if times else None,
            p=found.p,
            detectable=power.detectable(found.stderr),
            needed=found.needed(0.0),
        )
    if paired.n < FEWEST:
        return replace(plain, p=None, needed=FEWEST, reason=too_few(paired.n))
    identical = a.values == b.values and a.weights == b.weights and better != "unknown"
    return replace(plain, verdict="same" if identical else verdict(plain.ci95, better))


def too_few(n: int) -> str:
    """Why so few documents decide nothing."""
    return f"{n} {'sample decides' if n == 1 else 'samples decide'} nothing; {FEWEST} may"


def verdict(ci: Interval | None, better: Better) -> Verdict:
    """What an interval of the difference lets one say."""
    if better == "unknown":
        return "unknown"
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
    """The comparisons of one table, their verdicts corrected for there being several (Holm).

    Exact figures need none, and those without a verdict test nothing.
    """
    tested = [c for c in comparisons if c.p is not None and c.verdict != "unknown"]
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

"""One figure against another: difference, ratio, their intervals, and the verdict. Pure: numbers in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

from llmq.statistics import power
from llmq.statistics.estimates import FEWEST, difference, figure, ratio
from llmq.statistics.pairing import Pairs, pairs
from llmq.statistics.resampling import LEVEL, Interval
from llmq.types import Better, Measurement, Samples

Verdict = Literal["better", "worse", "same", "undecided", "unknown"]
"""`unknown`: the figure's direction is not known, so that neither is better."""
ALPHA = 1 - LEVEL
HEADER = 1e-3
"""The share of the bytes within which two sizes are the same: names and shapes in the header of a file."""


@dataclass(frozen=True)
class Comparison:
    """One figure of a stage against the same figure of another.

    For samples with ids the difference, the ratio and `n` are those of the documents that both stages scored;
    `only_stage` and `only_base` count the documents left out. `p` is that of no difference, `p_holm` that corrected for
    all comparisons of the table, which the verdict heeds. `detectable` is the smallest difference that so many
    samples see with 80 % power, `needed` the number that would see the difference found. `reason` explains a missing
    verdict, where the interval does not.
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


def _nearly_same_size(stage: Measurement, base: Measurement) -> bool:
    near = abs(stage.value - base.value) <= HEADER * base.value
    return stage.unit in ("bytes", "parameters") and near and stage.better != "unknown"


def multiple(value: float, base: float) -> float | None:
    """The ratio of two figures; None where the base is 0 or either is negative: no multiple tells their distance."""
    return value / base if base > 0 and value >= 0 else None


def compare(stage: Measurement, base: Measurement, seed: int = 0) -> Comparison:
    """Difference, ratio, their 95 % intervals from the pairs, and the verdict that the interval allows."""
    off, ratio_value = stage.value - base.value, multiple(stage.value, base.value)
    plain = Comparison(stage.task, stage.metric, off, ratio_value, None, None, verdict(None, stage.better))
    if stage.exact and base.exact:
        ci, ratio_ci = (off, off), (ratio_value, ratio_value) if ratio_value is not None else None
        told: Verdict = "same" if _nearly_same_size(stage, base) else verdict(ci, stage.better)
        if stage.unit == "parameters" and told == "worse":  # those of an adapter: what they cost, bytes tell
            told = "unknown"
        return replace(plain, ci95=ci, ratio_ci95=ratio_ci, verdict=told)
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
    if paired.only_stage or paired.only_base:  # the stages' own figures cover documents without a pair
        value, base_value = float(figure(a)[0]), float(figure(b)[0])
        plain = replace(plain, difference=value - base_value, ratio=multiple(value, base_value))
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
    """The reason that so few documents decide nothing."""
    return f"{n} {'sample decides' if n == 1 else 'samples decide'} nothing; {FEWEST} may"


def verdict(ci: Interval | None, better: Better) -> Verdict:
    """The verdict that an interval of the difference allows."""
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

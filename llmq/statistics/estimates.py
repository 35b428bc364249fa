"""A figure that samples make, alone or beside a base, with its interval. Pure: numbers in, numbers out.

No sample makes a figure certain. Where samples do not vary, at most a share `u` of all documents can be otherwise
(0 of n seen: the rule of three), and those move the mean by `u` times their distance at most: 1 for scores from 0 to 1,
else that of two unrelated samples. Where nothing tells that distance there is no interval.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, isfinite, log
from statistics import NormalDist

import numpy as np

from llmq.statistics import power, proportions
from llmq.statistics.pairing import check_pairs, count
from llmq.statistics.proportions import Table
from llmq.statistics.resampling import (
    EXP,
    LEVEL,
    LOG,
    PLAIN,
    ROUNDING,
    Array,
    Contrast,
    Interval,
    Mean,
    Resampled,
    Scale,
    believed,
    cluster_spread,
    commonest,
    quantile_spread,
    t_quantile,
    t_two_sided,
)
from llmq.types import Measurement, Samples

FEWEST = 8
"""Documents under which nothing is decided: intervals of fewer hold the truth too seldom (`tests/test_coverage.py`)."""

ENDLESS = 700.0
"""The logarithm of the largest figure; a float holds about e^709."""


@dataclass(frozen=True)
class Estimate:
    """A figure that samples make, alone or beside a base, and its 95 % interval.

    `stderr` is that of the figure, or with `log` that of the logarithm. `p` is that of no difference.
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
        """Both ends of the interval."""
        return self.low, self.high

    def needed(self, bound: float) -> int | None:
        """The number of samples that would tell on which side of `bound` the figure lies, if the figure stays."""
        inside = not self.log or (self.value > 0 and bound > 0)
        margin = (log(self.value / bound) if self.log else self.value - bound) if inside else float("nan")
        return power.needed(self.stderr, self.n, margin)


def difference(a: Samples, b: Samples, seed: int = 0) -> Estimate | None:
    """`figure(a) - figure(b)`. Raises `ValueError` if the samples are not of the same questions."""
    check_pairs(a, b)
    n, value = count(a), float(figure(a)[0] - figure(b)[0])
    if _is_binary(a) and _is_binary(b) and not a.clusters:
        if n < 2:
            return None
        table = Table.of(a.values, b.values)
        stderr, (low, high) = proportions.difference(table)
        return Estimate(value, low, high, stderr, n, p=proportions.mcnemar(table))
    if _are_one_network(a, b):
        return Estimate(0.0, 0.0, 0.0, 0.0, n)
    if a.statistic == "quantile":
        return _spread(a, lambda rows: figure(a, rows) - figure(b, rows), value, seed, max(map(abs, a.values)))
    found = _contrast(EXP if a.statistic == "exp" else PLAIN, seed, a, b)
    if not found or found.stderr:
        plain = Estimate(value, found.low, found.high, found.stderr, n, p=found.p) if found else None
        return _at_least(plain, _unseen(a, b))
    alike = _unvaried(a, b)
    if a.statistic != "exp":
        return alike
    times, level = _exponential(alike), float(figure(b)[0])
    if not times:
        return None
    low, high = (level * (end - 1) for end in times.interval)
    return Estimate(value, low, high, level * times.stderr, n, p=times.p)


def ratio(a: Samples, b: Samples, seed: int = 0) -> Estimate | None:
    """`figure(a) / figure(b)` of samples none of which is negative; `None` where the base may be 0."""
    check_pairs(a, b)
    n = count(a)
    if _is_binary(a) and _is_binary(b) and not a.clusters:
        table = Table.of(a.values, b.values)
        if n < 2 or not sum(b.values):
            return None
        stderr, (low, high) = proportions.ratio(table)
        if not isfinite(high):
            return None
        return Estimate(sum(a.values) / sum(b.values), low, high, stderr, n, log=True, p=proportions.mcnemar(table))
    if _are_one_network(a, b):
        return Estimate(1.0, 1.0, 1.0, 0.0, n, log=True)
    if a.statistic != "exp" and (min(a.values) < 0 or min(b.values) < 0):
        return None
    if a.statistic == "quantile":
        if min(a.values) <= 0 or min(b.values) <= 0:
            return None
        value = float(np.log(figure(a)[0] / figure(b)[0]))
        return _exponential(_spread(a, lambda rows: np.log(figure(a, rows) / figure(b, rows)), value, seed, 1.0))
    found = _contrast(PLAIN if a.statistic == "exp" else LOG, seed, a, b)
    if found and not found.stderr:
        return _exponential(_unvaried(a, b)) if a.statistic == "exp" else _unvaried_ratio(a, b)
    plain = Estimate(found.value, found.low, found.high, found.stderr, n, p=found.p) if found else None
    unseen = _unseen(a, b)
    if plain and unseen:
        # The figure of the base is taken as known.
        level = float(figure(b)[0])
        ends = [1 + end / level for end in unseen.interval]
        if ends[0] <= 0:
            return None
        plain = _at_least(plain, replace(unseen, low=log(ends[0]), high=log(ends[1]), stderr=unseen.stderr / level))
    return _exponential(plain)


def alone(a: Samples, seed: int = 0) -> Estimate | None:
    """The figure of one stage."""
    n, value = count(a), float(figure(a)[0])
    if n < 2:
        return None
    if _is_binary(a) and not a.clusters:
        low, high = proportions.wilson(int(sum(a.values)), n)
        return Estimate(value, low, high, (high - low) / (2 * proportions.Z), n)
    if a.statistic == "quantile":
        return _spread(a, lambda rows: figure(a, rows), value, seed, max(map(abs, a.values)))
    found = _contrast(PLAIN, seed, a)
    if found and not found.stderr:
        return _unvaried_share(a)
    plain = Estimate(found.value, found.low, found.high, found.stderr, n) if found else None
    return _exponential(plain) if a.statistic == "exp" else _at_least(plain, _unseen(a))


def _are_one_network(a: Samples, b: Samples) -> bool:
    """True for losses of texts that are the same to the last bit: sums over continuous logits are so by no accident.

    Scores are coarse: those of two networks are the same by accident.
    """
    return a.statistic == "exp" and count(a) >= FEWEST and (a.values, a.weights) == (b.values, b.weights)


def _unseen(a: Samples, b: Samples | None = None) -> Estimate | None:
    """A mean of scores from 0 to 1, or a difference of two, with room for what so few documents do not show.

    Most of few documents may score alike where one in ten is lost whole. As for right and wrong answers
    (`proportions.difference`), one document is added at each end of the range; with more documents only a part of one
    is added, and none from `resampling.FEW` on, unless most pairs differ alike, such as by nothing: their scatter is
    unseen. So 8 documents tell a difference to 0.20 at best, and 20 to 0.09.
    """
    if not (_are_shares(a) and (b is None or _are_shares(b))):
        return None
    scores = _rates(a) if b is None else _rates(a) - _rates(b)
    n, lowest = len(scores), 0.0 if b is None else -1.0
    added = 1.0 if 2 * commonest(scores - scores.mean()) >= n else min(1.0, 2 - 2 * believed(n))
    if not added:
        return None
    total = n + 2 * added
    middle = float(scores.sum() + added * (lowest + 1)) / total
    squares = float(np.sum(scores**2)) + added * (lowest**2 + 1)
    return _normal(middle, (squares - total * middle**2) ** 0.5 / total, n)


def _at_least(e: Estimate | None, other: Estimate | None) -> Estimate | None:
    """The estimate with the wider of both ends of two intervals."""
    if not e or not other:
        return e
    p = None if e.p is None or other.p is None else max(e.p, other.p)
    return replace(e, low=min(e.low, other.low), high=max(e.high, other.high), stderr=max(e.stderr, other.stderr), p=p)


def _unvaried(a: Samples, b: Samples) -> Estimate | None:
    """The difference of two means whose pairs all differ alike."""
    (values, weights), (others, other_weights) = _rows(a), _rows(b)
    n, found = len(values), float(values.sum() / weights.sum() - others.sum() / other_weights.sum())
    reach = 1.0 if _are_shares(a) and _are_shares(b) else abs(found) + _apart(a, b)
    if n < FEWEST or reach == abs(found):
        return None
    u = proportions.at_most(0, n)
    middle, half = (1 - u) * found, u * reach
    # The chance that `n` documents show no change, if just enough of all documents change to undo the difference.
    p = (reach / (reach + abs(found))) ** n
    return Estimate(found, middle - half, middle + half, half / proportions.Z, n, p=p)


def _unvaried_ratio(a: Samples, b: Samples) -> Estimate | None:
    """The ratio of two means whose pairs all have one ratio."""
    n, base = count(a), float(figure(b)[0])
    reach = 1.0 if _are_shares(a) and _are_shares(b) else _apart(a, a)
    if n < FEWEST or not reach or not base:
        return None
    mean, u = float(figure(a)[0]), proportions.at_most(0, n)
    shares = reach == 1.0 and _are_shares(a)
    low, high = ((1 - u) * mean, (1 - u) * mean + u) if shares else (mean - u * reach, mean + u * reach)
    if not low > 0:
        return None
    stderr = log(high / low) / (2 * proportions.Z)
    return Estimate(mean / base, low / base, high / base, stderr, n, log=True)


def _unvaried_share(a: Samples) -> Estimate | None:
    """A mean of scores from 0 to 1 that are all alike; of other scores nothing is known."""
    n = count(a)
    if n < FEWEST or not _are_shares(a):
        return None
    u, mean = proportions.at_most(0, n), float(figure(a)[0])
    return Estimate(mean, (1 - u) * mean, (1 - u) * mean + u, u / (2 * proportions.Z), n)


def _are_shares(samples: Samples) -> bool:
    """True for scores from 0 to 1, such as those of graded answers."""
    values, weights = _rows(samples)
    return samples.statistic == "mean" and bool((values >= 0).all() and (values <= weights).all())


def _apart(a: Samples, b: Samples) -> float:
    """The distance of two unrelated samples: the root of twice their variance."""
    return float(2**0.5 * max(_rates(one).std(ddof=1) for one in (a, b)))


def _exponential(e: Estimate | None) -> Estimate | None:
    """The estimate of a figure, from that of the logarithm; None if an end exceeds the range of floats."""
    if not e or max(abs(e.low), abs(e.high)) > ENDLESS:
        return None
    return Estimate(exp(e.value), exp(e.low), exp(e.high), e.stderr, e.n, log=True, p=e.p)


def _is_binary(samples: Samples) -> bool:
    return samples.statistic == "mean" and samples.weights is None and set(samples.values) <= {0.0, 1.0}


def _contrast(scale: Scale, seed: int, *sides: Samples) -> Contrast | None:
    resampled = _resampled(seed, *sides)
    return resampled.contrast(scale) if resampled else None


@lru_cache(maxsize=1)  # a difference and a ratio are taken of the same pairs, one after the other
def _resampled(seed: int, *sides: Samples) -> Resampled | None:
    means = [Mean(*_rows(s), sign) for s, sign in zip(sides, (1.0, -1.0), strict=False)]
    return Resampled(means, seed) if len(means[0].values) > 1 else None


def _rows(samples: Samples) -> tuple[Array, Array]:
    """Values and weights, summed over samples of the same document."""
    values, weights = np.asarray(samples.values, dtype=np.float64), _weights(samples)
    if samples.clusters is None:
        return values, weights
    _, which = np.unique(samples.clusters, return_inverse=True)
    return np.bincount(which, values), np.bincount(which, weights)


def _rates(samples: Samples) -> Array:
    """The score of each document."""
    values, weights = _rows(samples)
    return values / weights


def _weights(samples: Samples) -> Array:
    given = samples.weights
    return np.ones(len(samples.values)) if given is None else np.asarray(given, dtype=np.float64)


def _spread(a: Samples, figures: Callable[[Array], Array], value: float, seed: int, scale: float) -> Estimate | None:
    """A t interval about a quantile. None if no sample lies beyond the quantile: the scatter is unknown."""
    n = count(a)
    if n < 3 or len(a.values) * min(a.quantile, 1 - a.quantile) < 1:
        return None
    stderr = cluster_spread(figures, a.clusters, seed) if a.clusters else quantile_spread(figures, n, seed)
    if stderr <= ROUNDING * scale:  # equal rounds tell nothing of the scatter
        return None
    half = t_quantile((1 + LEVEL) / 2, n - 1) * stderr
    return Estimate(value, value - half, value + half, stderr, n, p=t_two_sided(value / stderr, n - 1))


def figure(samples: Samples, rows: Array = None) -> Array:
    """The figure that samples make; with `rows` (resamples, n) of indices, one figure for each resample."""
    values = np.asarray(samples.values, dtype=np.float64)
    rows = np.arange(len(values))[None] if rows is None else rows
    if samples.statistic == "quantile":
        return np.quantile(values[rows], samples.quantile, axis=1)
    mean = values[rows].sum(1) / _weights(samples)[rows].sum(1)
    return np.exp(mean) if samples.statistic == "exp" else mean


def unpaired(a: Measurement, b: Measurement, *, as_ratio: bool = False) -> Estimate | None:
    """A difference or ratio of figures whose standard errors alone are known.

    For answers to the same questions the interval is wider than needed, as such answers err together.
    """
    n, first, second = min(a.n, b.n), _known_stderr(a), _known_stderr(b)
    if first is None or second is None or (as_ratio and min(a.value, b.value) <= 0):
        return None
    if as_ratio:
        stderr = ((first / a.value) ** 2 + (second / b.value) ** 2) ** 0.5
        return _exponential(_normal(log(a.value / b.value), stderr, n))
    return _normal(a.value - b.value, (first**2 + second**2) ** 0.5, n)


def by_stderr(a: Measurement) -> Estimate | None:
    """A figure whose standard error alone is known."""
    if a.stderr or not _is_share(a):
        return _normal(a.value, a.stderr, a.n) if a.stderr else None
    low, high = proportions.wilson(round(a.value * a.n), a.n)
    return Estimate(a.value, low, high, (high - low) / (2 * proportions.Z), a.n)


def _known_stderr(a: Measurement) -> float | None:
    """The standard error; for equal answers, where that is 0, the one of Wilson's interval."""
    found = by_stderr(a)
    return found.stderr if found else None


def _is_share(a: Measurement) -> bool:
    """True if all of `n` answers were counted right, or all wrong."""
    is_share = a.unit.startswith("share") or a.unit == ""
    return is_share and a.value in (0.0, 1.0) and a.stderr == 0 and a.n > 0 and not a.exact


def _normal(value: float, stderr: float, n: int) -> Estimate:
    half = proportions.Z * stderr
    p = 2 * NormalDist().cdf(-abs(value) / stderr)
    return Estimate(value, value - half, value + half, stderr, n, p=p)

"""Intervals and tests of shares of right answers. Pure: counts in, numbers out.

A share moves in steps of one answer, so no interval covers 95 % at every truth: these cover it on average over truths,
and more where almost nothing is expected to change. The interval of a difference by Agresti & Min fails where all that
changed changed one way: there it goes at least as far as the exact bound on that one share. Of few pairs it fails where
many changed: there it reaches as far as Student's t. The least coverage over a grid of truths
(`tests/test_coverage.py` repeats it), of their interval alone and with both:

    pairs     8     12    20    30    50    100
    alone     0.83  0.84  0.85  0.89  0.87  0.87
    both      0.95  0.95  0.95  0.94  0.94  0.94
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

from llmq.statistics.resampling import LEVEL, Interval, t_quantile

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
FEW = 40
"""Pairs under which Student's t takes the place of the normal distribution."""


@dataclass(frozen=True)
class Table:
    """Two stages' answers to the same questions: both right, only the first, only the second, neither."""

    both: int
    gained: int
    lost: int
    neither: int

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> "Table":
        """Counted from scores that are 0 or 1."""
        cells = Counter(zip(a, b, strict=True))
        return cls(cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0])

    @property
    def n(self) -> int:
        """The number of questions."""
        return self.both + self.gained + self.lost + self.neither


def wilson(right: int, n: int, z: float = Z) -> Interval:
    """Score interval of one share (Wilson 1927)."""
    middle = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def at_most(seen: int, n: int) -> float:
    """The greatest share that `seen` of `n` leave possible, one-sided 95 % (Clopper & Pearson 1934)."""
    from scipy.special import betaincinv

    return float(betaincinv(seen + 1, n - seen, LEVEL)) if seen < n else 1.0


def difference(table: Table) -> tuple[float, Interval]:
    """Standard error and interval of the difference of two shares (Agresti & Min 2005, eq. 4).

    Half a question is added to each cell: a bootstrap would be sure of a difference as soon as the few answers that
    changed all changed the same way, and of none where nothing changed.
    """
    gained, lost, n = table.gained + 0.5, table.lost + 0.5, table.n + 2
    middle = (gained - lost) / n
    stderr = sqrt(gained + lost - n * middle**2) / n
    half = _reach(table.n) * stderr
    low, high = middle - half, middle + half
    if not table.gained:
        low = min(low, -at_most(table.lost, table.n))
    if not table.lost:
        high = max(high, at_most(table.gained, table.n))
    return stderr, (low, high)


def _reach(n: int) -> float:
    """The half interval of a difference in standard errors: that of Student's t where pairs are few."""
    return t_quantile((1 + LEVEL) / 2, n * max(0.5, n / FEW)) if n < FEW else Z


def ratio(table: Table) -> tuple[float, Interval]:
    """Standard error of the log, and interval, of the ratio of two shares (Bonett & Price 2006, hybrid of Wilson's)."""
    seen = table.both + table.gained + table.lost
    first, second = table.both + table.gained, table.both + table.lost
    stderr = sqrt((table.gained + table.lost + 2) / ((first + 1) * (second + 1)))
    alone = [sqrt((1 - (right + 1) / (seen + 2)) / (right + 1)) for right in (first, second)]
    z = Z * stderr / sum(alone)
    (low, high), (base_low, base_high) = (wilson(right, seen, z) for right in (first, second))
    low, high = low / base_high, high / base_low if base_low > 0 else float("inf")
    if not table.gained:  # then the ratio is the share that the base's right answers keep
        low = min(low, 1 - at_most(table.lost, second))
    if not table.lost:
        left = 1 - at_most(table.gained, first)
        high = max(high, 1 / left if left > 0 else float("inf"))
    return stderr, (low, high)


def mcnemar(table: Table) -> float:
    """Two-sided exact p of as many answers gained as lost (McNemar 1947): a fair coin for each answer that changed."""
    changed, fewer = table.gained + table.lost, min(table.gained, table.lost)
    if changed > 1000:  # exact sums need integers of hundreds of digits, and change nothing
        return 2 * NormalDist().cdf(-max(0, abs(table.gained - table.lost) - 1) / sqrt(changed))
    return min(1.0, 2 * sum(comb(changed, k) for k in range(fewer + 1)) / float(2**changed))

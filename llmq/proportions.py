"""Intervals and tests of shares of right answers. Pure: counts in, numbers out.

A share moves in steps of one answer, so no interval covers 95 % at every truth: these cover it on average over truths,
and more where almost nothing is expected to change.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

from llmq.resampling import LEVEL, Interval

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


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


def difference(table: Table) -> tuple[float, Interval]:
    """Standard error and interval of the difference of two shares (Agresti & Min 2005, eq. 4).

    Half a question is added to each cell: a bootstrap would be sure of a difference as soon as the few answers that
    changed all changed the same way, and of none where nothing changed.
    """
    gained, lost, n = table.gained + 0.5, table.lost + 0.5, table.n + 2
    middle = (gained - lost) / n
    stderr = sqrt(gained + lost - n * middle**2) / n
    return stderr, (middle - Z * stderr, middle + Z * stderr)


def ratio(table: Table) -> tuple[float, Interval]:
    """Standard error of the log, and interval, of the ratio of two shares (Bonett & Price 2006, hybrid of Wilson's)."""
    seen = table.both + table.gained + table.lost
    first, second = table.both + table.gained, table.both + table.lost
    stderr = sqrt((table.gained + table.lost + 2) / ((first + 1) * (second + 1)))
    alone = [sqrt((1 - (right + 1) / (seen + 2)) / (right + 1)) for right in (first, second)]
    z = Z * stderr / sum(alone)
    (low, high), (base_low, base_high) = (wilson(right, seen, z) for right in (first, second))
    return stderr, (low / base_high, high / base_low if base_low > 0 else float("inf"))


def mcnemar(table: Table) -> float:
    """Two-sided exact p of as many answers gained as lost (McNemar 1947): a fair coin for each answer that changed."""
    changed, fewer = table.gained + table.lost, min(table.gained, table.lost)
    if changed > 1000:  # the sums of the exact one need integers of hundreds of digits, and change nothing
        return 2 * NormalDist().cdf(-max(0, abs(table.gained - table.lost) - 1) / sqrt(changed))
    return min(1.0, 2 * sum(comb(changed, k) for k in range(fewer + 1)) / float(2**changed))

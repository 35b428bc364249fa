"""Power: the difference that a sample can see, the sample that can see a difference, several tests at once. Pure."""

from collections.abc import Sequence
from math import ceil, isfinite
from statistics import NormalDist

from llmq.statistics.resampling import LEVEL

POWER = 0.8
REACH = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
"""Standard errors that a true difference must measure to be seen in 4 of 5 such samples (2.80)."""


def detectable(stderr: float) -> float:
    """The smallest true difference that a two-sided 5 % test sees with 80 % power at this standard error."""
    return REACH * stderr


def needed(stderr: float, n: int, margin: float) -> int | None:
    """The number of samples that see a distance of `margin` with 80 % power, if `n` leave a standard error of `stderr`.

    `None` for a margin of 0: no number of samples decides about a figure that lies on its bound.
    """
    wanted = n * (REACH * stderr / margin) ** 2 if margin else float("inf")
    return ceil(wanted) if isfinite(wanted) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """The p of each of several tests, corrected so that any false alarm among all has 5 % at most (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected

"""How much of what a model said is left after it was changed. Pure: tensors in, numbers out."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

LITTLE = 0.05
"""A relative error that is small whatever the spread of the values, for outputs that hardly vary."""


@dataclass
class Likeness:
    """Sums over pairs of true and found values of one output, in double precision."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    error: float = 0.0

    def add(self, truth: Any, found: Any) -> None:
        """Take one more pair of tensors of one shape in."""
        truth, found = truth.double(), found.double()
        self.n += truth.numel()
        self.total += float(truth.sum())
        self.squares += float(truth.square().sum())
        self.error += float((found - truth).square().sum())

    @property
    def relative_error(self) -> float:
        """The norm of the error over that of the truth."""
        return float((self.error / self.squares) ** 0.5) if self.squares else float("inf") if self.error else 0.0

    @property
    def kept(self) -> float:
        """The share of the true values' variance that the found ones explain: 1 - error / variance, at most 1."""
        variance = self.squares - self.total**2 / self.n
        return 1 - self.error / variance if variance > 0 else float("-inf") if self.error else 1.0

    @property
    def is_garbage(self) -> bool:
        """Whether less than half of the variance is left, and that is no small error either."""
        return not isfinite(self.error) or (self.kept < 0.5 and self.relative_error > LITTLE)

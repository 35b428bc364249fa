"""How much of what a model said is left after it was changed. Pure: tensors in, numbers out."""

from collections.abc import Sequence
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


def in_order_of(truth: Sequence[Any], found: Sequence[Any]) -> tuple[Any, ...]:
    """`found` with its rows, which stand in no order, beside those of `truth` that they are nearest to.

    A row goes through all outputs, each `(images, rows, numbers)` and counted by its largest true value; no two rows
    stand beside one (the assignment of least total distance).
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    scales = [t.abs().max().clamp_min(1e-12) for t in truth]
    rows, others = (torch.cat([t / s for t, s in zip(side, scales, strict=True)], -1) for side in (truth, found))
    distances = torch.cdist(rows.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.nan_to_num(1e9, 1e9)  # what is no number is told apart later
    orders = [torch.from_numpy(linear_sum_assignment(each.numpy())[1]) for each in distances]
    return tuple(torch.stack([t[i, order] for i, order in enumerate(orders)]) for t in found)

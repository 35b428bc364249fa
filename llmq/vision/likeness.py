"""The share of a model's outputs that a change has kept. Pure: tensors in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LITTLE = 0.05
"""A relative error that is small for any spread of the values: outputs that hardly vary need such a bound."""


@dataclass
class Likeness:
    """Sums over pairs of true and changed values of one output, in double precision."""

    n: int = 0  # numbers in all tensors
    total: float = 0.0  # of the true values
    squares: float = 0.0  # of the true values
    error: float = 0.0  # squared differences

    def add(self, truth: Tensor, changed: Tensor) -> None:
        """Add a pair of tensors of one shape."""
        truth, changed = truth.double(), changed.double()
        self.n += truth.numel()
        self.total += float(truth.sum())
        self.squares += float(truth.square().sum())
        self.error += float((changed - truth).square().sum())

    @property
    def relative_error(self) -> float:
        """The norm of the error over the norm of the true values."""
        return float((self.error / self.squares) ** 0.5) if self.squares else float("inf") if self.error else 0.0

    @property
    def kept(self) -> float:
        """The share of the true values' variance that the changed values explain: 1 - error / variance, at most 1."""
        variance = self.squares - self.total**2 / self.n
        return 1 - self.error / variance if variance > 0 else float("-inf") if self.error else 1.0

    @property
    def is_garbage(self) -> bool:
        """True if the error is not finite, or is above `LITTLE` and leaves less than half of the variance."""
        return not isfinite(self.error) or (self.kept < 0.5 and self.relative_error > LITTLE)


def in_order_of(truth: Sequence[Tensor], changed: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Put each row of `changed`, where the order means nothing, at the place of the nearest row of `truth`.

    A row goes through all outputs, each `(images, rows, …)` and divided by its largest true value. Every row has
    one partner, by the assignment of least total distance.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    scales = [t.abs().max().clamp_min(1e-12) for t in truth]
    rows, others = (
        torch.cat([(t / s).reshape(*t.shape[:2], -1) for t, s in zip(side, scales, strict=True)], -1)
        for side in (truth, changed)
    )
    distances = torch.cdist(rows.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.nan_to_num(1e9, 1e9)  # (images, rows, rows); `judged` refuses values that are not finite
    orders = [torch.from_numpy(linear_sum_assignment(each.cpu().numpy())[1]) for each in distances]
    return tuple(torch.stack([t[i, order] for i, order in enumerate(orders)]) for t in changed)

"""ALPS: the mask of a layer and the weights that stay, by the alternating direction method of multipliers.

Meng et al. 2024 (arXiv 2406.07831). SparseGPT decides on 128 inputs at a time and never again. Here two copies of the
matrix are drawn together, one free and one sparse, so that each weight is decided with all others known; then the
weights that stay are fitted by conjugate gradients. Pure functions on matrices `[inputs, outputs]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.matrix.masks import lowest, lowest_of_each
from llmq.matrix.solver import damped

if TYPE_CHECKING:
    from torch import Tensor

PENALTY = 0.1
"""The first penalty for the distance of the copies, where each input's curvature is 1."""
EACH = 3
"""Rounds between two looks at the mask."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By the share of the weights that stay that changed since the last look, the factor of the penalty."""
ROUNDS = 300
"""Rounds at most; a mask that a look finds unchanged ends them."""
USUAL = 40
"""Rounds until that, about."""
FITS = 10
"""Steps of conjugate gradients on the weights that stay."""


def alps(weight: Tensor, hessian: Tensor, damping: float, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """The matrix `[outputs, inputs]` pruned, the weights left adjusted; `hessian` is `X^T X` `[inputs, inputs]`."""
    curvature = damped(hessian, damping)
    unit = curvature.diagonal().sqrt().unsqueeze(1)  # (inputs, 1)
    curvature = curvature / unit / unit.t()  # of diagonal 1, so that magnitudes compare
    target = weight.t() * unit  # (inputs, outputs)
    stays = _mask(target, curvature, share, of_each)
    return (_fitted(target, curvature, stays) / unit).t().contiguous()


def _mask(target: Tensor, curvature: Tensor, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """True for each weight that stays."""
    import torch

    values, vectors = torch.linalg.eigh(curvature)
    pull, penalty = curvature @ target, PENALTY
    sparse, dual = target, torch.zeros_like(target)
    stays, seen = torch.ones_like(target, dtype=torch.bool), None
    for i in range(ROUNDS):
        wanted = vectors.t() @ (pull - dual + penalty * sparse)
        free = vectors @ wanted.div_((values.clamp_min(0) + penalty).unsqueeze(1))
        stays = _largest(free + dual / penalty, share, of_each)
        sparse = (free + dual / penalty).mul_(stays)
        dual = dual + penalty * (free - sparse)
        if i % EACH == 0:
            changed = 1.0 if seen is None else float((stays ^ seen).sum() / stays.sum())
            if not changed:
                break
            penalty *= next(factor for least, factor in GROWTH if changed >= least)
            seen = stays
    return stays


def _largest(values: Tensor, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """True for all but the `share` of the smallest, in the whole matrix or in each n:m group of an output's inputs."""
    if of_each:
        return ~lowest_of_each(values.abs().t(), *of_each).t()
    return ~lowest(values.abs().flatten(), share).view_as(values)


def _fitted(target: Tensor, curvature: Tensor, stays: Tensor) -> Tensor:
    """The weights of the least error `tr(E^T H E)` among those that stay; all outputs step by step at once."""
    fitted = target * stays
    left = (curvature @ (target - fitted)).mul_(stays)  # the gradient, (inputs, outputs)
    step, square = left, left.square().sum(0)
    for _ in range(FITS):
        pushed = (curvature @ step).mul_(stays)
        length = square / (step * pushed).sum(0).clamp_min(1e-30)
        fitted, left = fitted + length * step, left - length * pushed
        before, square = square, left.square().sum(0)
        step = left + square / before.clamp_min(1e-30) * step
    return fitted

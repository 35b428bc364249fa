"""Coordinate descent after GPTQ: each code goes to its best place given all others, then the scales are fitted anew.

GPTQ decides on each input once, before the inputs to come are rounded; a sweep decides again with all errors known
(QuantEase, Behdin et al. 2023, arXiv 2309.01885). For given codes the best scales of an output solve a linear system
with one row a group. Neither ever raises the error `tr(E^T H E)`. Pure functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llmq.matrix.grid import LARGEST, Quantized
from llmq.matrix.solver import BLOCK, INNER, damped

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3
"""The pull of each fitted scale to the one before, as a share of the mean curvature of the scales."""


def descend(
    weight: Tensor, hessian: Tensor, made: Quantized, damping: float, sweeps: int, keep_zeros: bool = False
) -> Quantized:
    """`made` of a matrix `[outputs, inputs]` with other codes and scales, nearer to it by the damped `hessian`.

    `hessian` is `X^T X` `[inputs, inputs]`. Grids keep their zero points, and with `keep_zeros` weights of 0 stay 0.
    """
    if not sweeps:
        return made
    place = made.g_idx.long().argsort(stable=True)  # group after group
    target = weight.float().t()[place].contiguous()  # (inputs, outputs)
    curvature = damped(hessian, damping)[place.unsqueeze(1), place]  # (inputs, inputs)
    scales, zeros = made.scales.float(), made.zeros.float()  # (groups, outputs)
    levels = _levels(made.codes[place].float(), zeros)  # codes less their zeros (inputs, outputs)
    kept = (target != 0).float() if keep_zeros else None
    for _ in range(sweeps):
        levels = _swept(target, curvature, levels, scales, zeros, made.bits, kept)
        fitted = _fitted(target, curvature, levels, scales)
        before, after = (_errors(target, curvature, levels, scale) for scale in (scales, fitted))
        scales = fitted.where(after < before, scales)
    codes = _levels(levels, -zeros).round_().to(made.codes.dtype)[place.argsort()]
    return replace(made, codes=codes, scales=scales.to(made.scales.dtype))


def _levels(codes: Tensor, zeros: Tensor) -> Tensor:
    return (codes.view(len(zeros), -1, codes.shape[1]) - zeros.unsqueeze(1)).view_as(codes)


def _points(levels: Tensor, scales: Tensor) -> Tensor:
    return (levels.view(len(scales), -1, levels.shape[1]) * scales.unsqueeze(1)).view_as(levels)


def _errors(target: Tensor, curvature: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """The error `e^T H e` of each output `[outputs]`."""
    off = target - _points(levels, scales)  # (inputs, outputs)
    return ((curvature @ off) * off).sum(0)


def _swept(
    target: Tensor,
    curvature: Tensor,
    levels: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    kept: Tensor | None,
) -> Tensor:
    """The levels after each was decided once more, those of the largest curvature first."""
    import torch

    order = curvature.diagonal().argsort(descending=True, stable=True)  # (inputs,)
    curved, size = curvature[order.unsqueeze(1), order], len(target) // len(scales)
    groups, grids = (order // size).tolist(), list(zip(scales, -zeros, 2**bits - 1 - zeros, strict=True))
    points = _points(levels, scales)[order]  # (inputs, outputs)
    pulls = curved @ (target[order] - points)  # (inputs, outputs): where the error would have each point go
    moves, point = torch.empty_like(points[:BLOCK]), torch.empty_like(points[0])
    inverse = 1 / curved.diagonal()
    for start in range(0, len(points), BLOCK):
        stop = min(start + BLOCK, len(points))
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            for i in range(first, last):
                scale, least, most = grids[groups[i]]
                torch.addcmul(points[i], pulls[i], inverse[i], out=point)
                point.div_(scale).round_().clamp_(least, most).mul_(scale)
                if kept is not None:
                    point.mul_(kept[order[i]])
                torch.sub(point, points[i], out=moves[i - start])
                points[i] = point
                pulls[i:last].addr_(curved[i:last, i], moves[i - start], alpha=-1)
            done = moves[first - start : last - start]
            pulls[last:stop].addmm_(curved[last:stop, first:last], done, alpha=-1)
        pulls[stop:].addmm_(curved[stop:, start:stop], moves[: stop - start], alpha=-1)
    swept = points[order.argsort()].view(len(scales), size, -1) / scales.unsqueeze(1)
    return swept.round_().view_as(levels)


def _fitted(target: Tensor, curvature: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """The scales of the least error for these levels, near those before, as files and kernels hold them."""
    import torch

    groups, outputs = scales.shape
    grouped = levels.view(groups, -1, outputs)  # (groups, inputs of a group, outputs)
    size = grouped.shape[1]
    wanted = (grouped * (curvature @ target).view_as(grouped)).sum(1).t()  # (outputs, groups)
    system = scales.new_empty(outputs, groups, groups)
    for group in range(groups):
        pulled = curvature[:, group * size : (group + 1) * size] @ grouped[group]  # (inputs, outputs)
        system[:, :, group] = (grouped * pulled.view_as(grouped)).sum(1).t()
    pull = RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30)  # (outputs, 1)
    system.diagonal(dim1=1, dim2=2).add_(pull)
    found = torch.linalg.solve(system, wanted + pull * scales.t()).t()  # (groups, outputs)
    # A scale that files and kernels can both hold; one far from the old one belongs to a group without weight.
    near = (found > scales / 2) & (found < scales * 2)
    stored: Tensor = found.where(near, scales).bfloat16().half().clamp(2.0**-24, LARGEST).float()
    return stored

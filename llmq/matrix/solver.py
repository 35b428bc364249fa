"""GPTQ: a matrix is rounded input by input, and the inputs still to come make each error good.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1, on matrices `[inputs, outputs]`: weights that are rounded together
lie together. The same elimination prunes in SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774). Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.matrix.grid import Quantized, codes_of, find_grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""The errors of 128 inputs are spread over all later inputs at once, those of 32 over the rest of the 128."""
INNER = 32
DAMP_INCREMENT = 0.0125
"""`damp_percent` grows by this, times 1, 2, 4, …, until the factorization succeeds."""


def elimination(hessian: Tensor, damp_percent: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse of a damped Hessian, its inputs in `order`, and the damping used.

    Row `i`, divided by its diagonal, holds the shares of an error in input `i` that later inputs take. `hessian` is
    `X^T X` `[inputs, inputs]`. An input that is always 0 gets the mean curvature and stays uncoupled: its weights are
    rounded to nearest. Raises `UserError` for values that are not finite, or if no damping below 1 helps.
    """
    import torch

    diagonal, mean = _diagonal(hessian)
    # The Cholesky factor of the reversed matrix, reversed, is upper: H = R R^T, so that H^-1 = R^-T R^-1 and the
    # factor that GPTQ wants is R^-1: one factorization and one triangular inverse in place of three steps.
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    tried, increment = damp_percent, DAMP_INCREMENT
    while True:
        factor = hessian[backwards.unsqueeze(1), backwards]  # (inputs, inputs), a copy
        factor.diagonal().copy_((diagonal + tried * mean)[backwards])
        factor, info = torch.linalg.cholesky_ex(factor)
        if int(info) == 0:
            break
        tried, increment = tried + increment, increment * 2
        if tried >= 1:
            raise UserError(f"the Hessian of the calibration cannot be factorized, even damped by {tried:.2f}")
    inverse = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)  # (inputs, inputs)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor  # one matrix less while the result is copied
    return inverse.flip(0, 1), tried


def _diagonal(hessian: Tensor) -> tuple[Tensor, float]:
    """The sum of x² of each input `[inputs]`, the mean where an input is always 0; and the mean."""
    import torch

    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("the calibration gives activations that are not finite; look at the model and the data")
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    return diagonal, mean


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy of the Hessian with `damping` times its mean curvature on the diagonal."""
    diagonal, mean = _diagonal(hessian)
    made = hessian.clone()
    made.diagonal().copy_(diagonal + damping * mean)
    return made


def compensate(rows: Tensor, upper: Tensor, choose: Callable[[int, Tensor], Tensor]) -> None:
    """Replace each row of `[inputs, outputs]` in place, one after another, by `choose(i, row)`.

    The error of each row is spread over the rows below by `upper`. When `choose` is called, `rows[i : i + m]` have the
    errors of all rows before them if `m` divides `i`, and divides 32 or is a multiple of it.
    """
    import torch

    errors = torch.empty(BLOCK, rows.shape[1], dtype=rows.dtype, device=rows.device)  # (block, outputs)
    each, error_of = rows.unbind(0), errors.unbind(0)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        count = stop - start
        shares = upper[start:stop, start:] / upper.diagonal()[start:stop].unsqueeze(1)  # (block, inputs from start on)
        for first in range(0, count, INNER):
            last = min(first + INNER, count)
            for k in range(first, last):
                row, error = each[start + k], error_of[k]
                chosen = choose(start + k, row)
                torch.sub(row, chosen, out=error)
                row.copy_(chosen)
                # A rank-1 update is slow, so an error reaches only the rest of its 32 inputs now.
                rows[start + k + 1 : start + last].addr_(shares[k, k + 1 : last], error, alpha=-1)
            rows[start + last : stop].addmm_(shares[first:last, last:count].t(), errors[first:last], alpha=-1)
        rows[stop:].addmm_(shares[:, count:].t(), errors[:count], alpha=-1)


def solve(
    weight: Tensor,
    upper: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool = False,
    order: Tensor | None = None,
    static_groups: bool = False,
    keep_zeros: bool = False,
) -> Quantized:
    """The matrix `[outputs, inputs]` quantized, given the elimination of its inputs (taken in `order` if given).

    A group is `group_size` inputs that follow one another in rounding (-1: all inputs), and gets its grids when the
    block of 128 that holds the group begins. `static_groups` fixes groups and grids beforehand in the matrix's own
    order, so that `order` costs nothing at inference.
    """
    import torch

    columns = weight.t()  # (inputs, outputs)
    rows = (columns if order is None else columns[order]).clone(memory_format=torch.contiguous_format)
    inputs, outputs = rows.shape
    size = inputs if group_size == -1 else group_size
    place = torch.arange(inputs, device=rows.device)
    g_idx = (order if static_groups and order is not None else place) // size  # (inputs,): as they are rounded
    scales, zeros, low, high = rows.new_empty(
        4, inputs // size, outputs
    )  # low, high: the range of a code less its zero

    def fix(of: slice, weights: Tensor) -> None:
        scales[of], zeros[of] = find_grid(weights.view(-1, size, outputs), bits, sym, mse)
        low[of], high[of] = -zeros[of], 2**bits - 1 - zeros[of]

    if static_groups:
        fix(slice(None), columns.contiguous())
    groups, grids, point = g_idx.tolist(), list(zip(scales, low, high, strict=True)), torch.empty_like(rows[0])
    kept = (rows != 0).to(rows.dtype) if keep_zeros else None  # a pruned weight stays 0, whatever errors reach it
    step = max(BLOCK, size)

    def choose(i: int, row: Tensor) -> Tensor:
        if i % step == 0 and not static_groups:
            fix(slice(i // size, (i + step) // size), rows[i : i + step])
        scale, least, most = grids[groups[i]]
        torch.div(row, scale, out=point).round_().clamp_(least, most).mul_(scale)
        return point if kept is None else point.mul_(kept[i])

    compensate(rows, upper, choose)
    if order is not None and static_groups:
        rows, g_idx, order = rows[order.argsort()], place // size, None
    codes = codes_of(rows, scales, zeros)  # group after group: before the inputs go back to the matrix's own order
    if order is not None:
        back = order.argsort()
        codes, g_idx = codes[back], g_idx[back]
    return Quantized(codes, scales, zeros, g_idx.to(torch.int32), bits)

"""GPTQ: rounding a matrix input by input, every error made good by the inputs still to come.

Frantar et al. 2022 (arXiv 2210.17323), algorithm 1, on matrices `[inputs, outputs]`, so that what is rounded together
lies together. The same elimination prunes in SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774). Pure functions.
"""

from collections.abc import Callable
from typing import Any

from llmq.errors import UserError
from llmq.quantize.grid import Quantized, codes_of, find_grid

BLOCK = 128
"""Inputs after which the errors are spread over all that are left; 32 within, and one at a time within those."""
INNER = 32
DAMP_INCREMENT = 0.0125
"""What is added to `damp_percent`, times 1, 2, 4, …, until the factorization succeeds."""


def elimination(hessian: Any, damp_percent: float, order: Any = None) -> tuple[Any, float]:
    """The upper Cholesky factor of the inverse of a damped Hessian, its inputs in `order`, and the damping used.

    Row `i`, divided by its diagonal, says how an error in input `i` is made good by the inputs after it. `hessian` is
    `X^T X` `[inputs, inputs]`. An input that never fires gets the mean curvature and stays uncoupled: it is rounded to
    nearest. Raises `UserError` for values that are not finite, or if no damping below 1 helps.
    """
    import torch

    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("the calibration gives activations that are not finite; look at the model and the data")
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    # The Cholesky factor of the reversed matrix, reversed, is upper: H = R R^T, so that H^-1 = R^-T R^-1 and the
    # factor that GPTQ wants is R^-1: one factorization and one triangular inverse in place of three steps.
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    tried, increment = damp_percent, DAMP_INCREMENT
    while True:
        factor = hessian[backwards.unsqueeze(1), backwards]
        factor.diagonal().copy_((diagonal + tried * mean)[backwards])
        factor, info = torch.linalg.cholesky_ex(factor)
        if int(info) == 0:
            break
        tried, increment = tried + increment, increment * 2
        if tried >= 1:
            raise UserError(f"the Hessian of the calibration cannot be factorized, even damped by {tried:.2f}")
    inverse = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return inverse.flip(0, 1), tried


def compensate(rows: Any, upper: Any, choose: Callable[[int, Any], Any]) -> None:
    """Replace row after row of `[inputs, outputs]`, in place, by what `choose(i, row)` makes of it.

    The error of each is spread over the rows below by `upper`. A choice finds `rows[i : i + m]` as they are by then if
    `m` divides `i`, and divides 32 or is a multiple of it.
    """
    import torch

    errors = torch.empty(BLOCK, rows.shape[1], dtype=rows.dtype, device=rows.device)
    each, error_of = rows.unbind(0), errors.unbind(0)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        count = stop - start
        shares = upper[start:stop, start:] / upper.diagonal()[start:stop].unsqueeze(1)
        for first in range(0, count, INNER):
            last = min(first + INNER, count)
            for k in range(first, last):
                row, error = each[start + k], error_of[k]
                chosen = choose(start + k, row)
                torch.sub(row, chosen, out=error)
                row.copy_(chosen)
                rows[start + k + 1 : start + last].addr_(shares[k, k + 1 : last], error, alpha=-1)
            made = errors[first:last]
            rows[start + last : stop].addmm_(shares[first:last, last:count].t(), made, alpha=-1)
        rows[stop:].addmm_(shares[:, count:].t(), errors[:count], alpha=-1)


def solve(
    weight: Any,
    upper: Any,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool = False,
    order: Any = None,
    static_groups: bool = False,
    keep_zeros: bool = False,
) -> Quantized:
    """The matrix `[outputs, inputs]` quantized, given the elimination of its inputs (taken in `order` if given).

    Groups are `group_size` inputs that follow one another as they are rounded (-1: all), their grids found when the
    block of 128 that holds them begins. `static_groups` fixes groups and grids beforehand in the matrix's own order, so
    that an order costs nothing at inference.
    """
    import torch

    columns = weight.t()
    rows = (columns if order is None else columns[order]).clone(memory_format=torch.contiguous_format)
    inputs, outputs = rows.shape
    size = inputs if group_size == -1 else group_size
    place = torch.arange(inputs, device=rows.device)
    g_idx = (order if static_groups and order is not None else place) // size
    scales, zeros, low, high = rows.new_empty(4, inputs // size, outputs)

    def fix(of: slice, weights: Any) -> None:
        scales[of], zeros[of] = find_grid(weights.view(-1, size, outputs), bits, sym, mse)
        low[of], high[of] = -zeros[of], 2**bits - 1 - zeros[of]

    if static_groups:
        fix(slice(None), columns.contiguous())
    groups, grids, point = g_idx.tolist(), list(zip(scales, low, high, strict=True)), torch.empty_like(rows[0])
    kept = (rows != 0).to(rows.dtype) if keep_zeros else None
    step = max(BLOCK, size)

    def choose(i: int, row: Any) -> Any:
        if i % step == 0 and not static_groups:
            fix(slice(i // size, (i + step) // size), rows[i : i + step])
        scale, least, most = grids[groups[i]]
        torch.div(row, scale, out=point).round_().clamp_(least, most).mul_(scale)
        return point if kept is None else point.mul_(kept[i])

    compensate(rows, upper, choose)
    back = None if order is None else order.argsort()
    if back is not None and static_groups:
        rows, g_idx, back = rows[back], place // size, None
    codes = codes_of(rows, scales, zeros)
    if back is not None:
        codes, g_idx = codes[back], g_idx[back]
    return Quantized(codes, scales, zeros, g_idx.to(torch.int32), bits)

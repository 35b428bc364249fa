"""Masks of the weights to prune, and SparseGPT. Pure functions on matrices `[outputs, inputs]`; True is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.matrix.solver import BLOCK, compensate

if TYPE_CHECKING:
    from torch import Tensor


def lowest(scores: Tensor, share: float) -> Tensor:
    """The mask of the `share` lowest scores in each row of the last dimension."""
    import torch

    least = scores.topk(round(share * scores.shape[-1]), largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)


def lowest_of_each(scores: Tensor, stay: int, among: int) -> Tensor:
    """The mask of all but the `stay` greatest of every `among` neighbours along the last dimension."""
    groups = scores.reshape(*scores.shape[:-1], -1, among)  # (outputs, groups, among)
    return lowest(groups, (among - stay) / among).flatten(-2)


def by_magnitude(weight: Tensor, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """The mask of the weights nearest to zero, in the whole matrix or in each n:m group."""
    scores = weight.abs()
    return lowest_of_each(scores, *of_each) if of_each else lowest(scores.flatten(), share).view_as(weight)


def by_wanda(weight: Tensor, squares: Tensor, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """Wanda (Sun et al. 2023, eq. 1): the least `|w| * ||x||`, compared within each output.

    `squares` `[inputs]` are the sums of the squared inputs.
    """
    scores = weight.abs() * squares.sqrt()  # (outputs, inputs)
    return lowest_of_each(scores, *of_each) if of_each else lowest(scores, share)


def sparsegpt(weight: Tensor, upper: Tensor, share: float, of_each: tuple[int, int] | None) -> Tensor:
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1): the matrix pruned, the weights left adjusted.

    `upper` is the elimination of the inputs (`solver.elimination`). The weights of the least error `w^2 / [H^-1]` go,
    as they are once their block is reached: a block is 128 inputs of all outputs, or an n:m group.
    """
    import torch

    rows = weight.t().clone(memory_format=torch.contiguous_format)  # (inputs, outputs)
    curvature = upper.diagonal().square().unsqueeze(1)  # (inputs, 1): [H^-1]_ii once the inputs before i are gone
    step = of_each[1] if of_each else BLOCK
    kept = rows.new_empty(step, rows.shape[1])  # (inputs of a block, outputs): 0 for a pruned weight, 1 for any other

    def choose(i: int, row: Tensor) -> Tensor:
        if i % step == 0:
            scores = rows[i : i + step].square() / curvature[i : i + step]
            if of_each:
                gone = lowest_of_each(scores.t(), *of_each).t()  # a group lies along the inputs, which are rows here
            else:
                gone = lowest(scores.flatten(), share).view_as(scores)
            kept[: len(gone)] = (~gone).to(kept.dtype)
        return row * kept[i % step]

    compensate(rows, upper, choose)
    return rows.t().contiguous()

"""Which weights go: scores to masks, and SparseGPT. Pure functions on matrices `[outputs, inputs]`; True is pruned."""

from typing import Any

from llmq.quantize.gptq_solver import BLOCK, compensate


def lowest(scores: Any, share: float) -> Any:
    """The `share` of the scores that are least, in each row of the last dimension."""
    import torch

    least = scores.topk(round(share * scores.shape[-1]), largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)


def lowest_of_each(scores: Any, stay: int, among: int) -> Any:
    """All but the `stay` greatest of every `among` neighbours along the last dimension."""
    groups = scores.unflatten(-1, (-1, among))
    return lowest(groups, (among - stay) / among).flatten(-2)


def by_magnitude(weight: Any, share: float, of_each: tuple[int, int] | None) -> Any:
    """The weights nearest to zero, of the whole matrix or of each n:m group."""
    scores = weight.abs()
    return lowest_of_each(scores, *of_each) if of_each else lowest(scores.flatten(), share).view_as(weight)


def by_wanda(weight: Any, squares: Any, share: float, of_each: tuple[int, int] | None) -> Any:
    """Wanda (Sun et al. 2023, eq. 1): the least `|w| * ||x||`, compared within each output.

    `squares` `[inputs]` are the sums of the squared inputs.
    """
    scores = weight.abs() * squares.sqrt()
    return lowest_of_each(scores, *of_each) if of_each else lowest(scores, share)


def sparsegpt(weight: Any, upper: Any, share: float, of_each: tuple[int, int] | None) -> Any:
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1): the matrix pruned, the rest adjusted to make it good.

    `upper` is the elimination of its inputs (`gptq_solver.elimination`). What goes is chosen where the error
    `w^2 / [H^-1]` is least: among 128 inputs of all outputs, or in each n:m group, as the weights are by then.
    """
    import torch

    rows = weight.t().clone(memory_format=torch.contiguous_format)
    curvature = upper.diagonal().square().unsqueeze(1)
    step = of_each[1] if of_each else BLOCK
    kept = rows.new_empty(step, rows.shape[1])

    def choose(i: int, row: Any) -> Any:
        if i % step == 0:
            scores = rows[i : i + step].square() / curvature[i : i + step]
            gone = (
                lowest_of_each(scores.t(), *of_each).t() if of_each else lowest(scores.flatten(), share).view_as(scores)
            )
            kept[: len(gone)] = (~gone).to(kept.dtype)
        return row * kept[i % step]

    compensate(rows, upper, choose)
    return rows.t().contiguous()

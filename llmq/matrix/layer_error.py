"""How far a changed layer is from the layer that it was. Pure."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = 64
"""Outputs of a layer, evenly spread, from which the error of all is taken: enough, and quick beside GPTQ."""


def layer_error(weight: Tensor, made: Tensor, gram: Tensor | None = None) -> float:
    """`‖(W - W')X‖ / ‖WX‖` for weights `[outputs, inputs]`; `‖W - W'‖ / ‖W‖` without inputs.

    `gram` is `X X^T` `[inputs, inputs]`, or its diagonal `[inputs]`. Of a layer of zeros the error is 0 if it stayed
    one, else infinite.
    """
    import torch

    chosen = torch.linspace(0, len(weight) - 1, min(OUTPUTS, len(weight)), device=weight.device).long()
    before = weight[chosen].float()  # (chosen, inputs)
    squares = [_square(part, gram) for part in (before - made[chosen].to(before), before)]
    return (squares[0] / squares[1]) ** 0.5 if squares[1] > 0 else float("inf") if squares[0] > 0 else 0.0


def layer_facts(before: Tensor, made: Tensor, bits: int | None, gram: Tensor | None = None) -> dict[str, object]:
    """The facts about a changed layer for `layers.json`: bits, the error and what it is of, the share of zeros.

    Weights are `[outputs, inputs]`, `gram` is as in `layer_error`. An infinite error is left out.
    """
    shown = {"error": layer_error(before, made, gram), "zeros": 1 - int(made.count_nonzero()) / made.numel()}
    facts = {name: float(f"{value:.3g}") for name, value in shown.items() if isfinite(value)}
    return {"bits": bits, "error_of": "weights" if gram is None else "outputs", **facts}


def _square(rows: Tensor, gram: Tensor | None) -> float:
    """The sum over rows of `row X X^T row^T`, which is the squared norm of the outputs."""
    products = rows
    if gram is not None:
        products = rows @ gram.float() if gram.ndim == 2 else rows * gram.float()
    return max(0.0, float((products * rows).sum()))

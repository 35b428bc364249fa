"""A softmax of float32 that keeps its rounded output alone for the gradient: a third of what autograd would keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RoundedSoftmax(torch.autograd.Function):
    """The softmax over the last dimension in float32, rounded to `dtype`; the gradient takes it as rounded."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dtype: torch.dtype) -> Tensor:
        weights = scores.softmax(-1, dtype=torch.float32).to(dtype)
        ctx.save_for_backward(weights)
        ctx.dtype = scores.dtype
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        made = torch._softmax_backward_data(gradient.float(), weights.float(), -1, torch.float32)
        return made.to(ctx.dtype), None

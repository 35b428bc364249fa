"""Cross-entropy of an output head without all logits in memory. Pure.

A vocabulary of 49,152 makes 200 kB of float32 logits a token, several times over in the backward pass. Here a
few rows of logits live at a time; the forward pass makes the gradient too, from the same logits (Hsu et al. 2024,
Liger kernels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS_AT_A_TIME = 256


class LinearCrossEntropy(torch.autograd.Function):
    """`sum over tokens of -log softmax(hidden @ weight.T + bias)[target]`, differentiable in `hidden` alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """hidden (tokens, d), weight (vocabulary, d), bias (vocabulary) or None, targets (tokens). A float32 sum."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)  # (tokens, d)
        learning = ctx.needs_input_grad[0]
        for start in range(0, len(hidden), ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
            picked = targets[part, None]  # (tokens, 1)
            normaliser = logits.logsumexp(-1, keepdim=True)  # (tokens, 1)
            total += (normaliser - logits.gather(1, picked)).sum()
            if learning:
                # The gradient of -log softmax(z)[t] in z is softmax(z), less 1 at t.
                probability = logits.sub_(normaliser).exp_()  # (tokens, vocabulary), in the logits' memory
                probability.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=probability.dtype))
                gradient[part] = (probability.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor, ignored: int) -> Tensor:
    """The summed loss of the tokens whose target is not `ignored`; only those pass through the head.

    hidden (tokens, d), targets (tokens).
    """
    kept = targets != ignored
    total: Tensor = LinearCrossEntropy.apply(hidden[kept], head.weight, head.bias, targets[kept])
    return total

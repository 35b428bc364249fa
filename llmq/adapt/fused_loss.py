"""Cross-entropy of an output head without its logits in memory. Pure.

A vocabulary of 49,152 makes 200 kB of float32 logits a token, several times over in the backward pass. Here they live
a few rows at a time; the gradient is made in the forward pass, while they are warm (Hsu et al. 2024, Liger kernels).
"""

from typing import Any

import torch

ROWS_AT_A_TIME = 256


class LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """`sum over tokens of -log softmax(hidden @ weight.T + bias)[target]`, differentiable in `hidden` alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any) -> Any:
        """hidden (tokens, d), weight (vocabulary, d), bias (vocabulary) or None, targets (tokens). A float32 sum."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        learning = ctx.needs_input_grad[0]
        for start in range(0, len(hidden), ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
            picked = targets[part, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, picked)).sum()
            if learning:
                probability = logits.sub_(normaliser).exp_()
                probability.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=probability.dtype))
                gradient[part] = (probability.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """The gradient made on the way, times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Any, head: Any, targets: Any, ignored: int) -> Any:
    """Summed loss of the tokens whose target is not `ignored`; only those pass through the head at all."""
    kept = targets != ignored
    return LinearCrossEntropy.apply(hidden[kept], head.weight, head.bias, targets[kept])

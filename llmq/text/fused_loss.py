"""Cross-entropy of an output head without all logits in memory, alone or mixed with a teacher's answers. Pure.

A vocabulary of 49,152 makes 200 kB of float32 logits a token, several times over in the backward pass. Here a
few rows of logits live at a time; the forward pass makes the gradient too, from the same logits (Hsu et al. 2024,
Liger kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROWS_AT_A_TIME = 128


@dataclass(frozen=True)
class Taught:
    """The logits of a teacher for the same tokens, and their part of the loss (Hinton et al. 2015).

    The loss is `(1 - alpha) * cross-entropy + alpha * temperature^2 * KL(teacher || student)`. Both distributions of
    the divergence are at the temperature, whose square keeps the size of the gradient.
    """

    logits: Callable[[slice], Tensor]
    """A slice of the tokens -> logits `(tokens, vocabulary)`."""
    alpha: float
    temperature: float


class LinearCrossEntropy(torch.autograd.Function):
    """`sum over tokens of -log softmax(hidden @ weight.T + bias)[target]`, differentiable in all but the targets."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, taught: Taught | None
    ) -> Tensor:
        """hidden (tokens, d), weight (vocabulary, d), bias (vocabulary) or None, targets (tokens). A float32 sum."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        matrix = weight.to(dtype)  # once, not for each few rows
        for start in range(0, len(hidden), ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            rows = hidden[part].to(dtype)
            logits = functional.linear(rows, matrix, None if bias is None else bias.to(dtype)).float()
            loss, gradient = _loss_and_gradient(logits, targets[part, None], taught, part)
            total += loss
            gradient = gradient.to(dtype)  # (tokens, vocabulary)
            if of_hidden is not None:
                of_hidden[part] = (gradient @ matrix).to(hidden.dtype)
            if of_weight is not None:
                of_weight += gradient.t() @ rows
            if of_bias is not None:
                of_bias += gradient.sum(0)
        ctx.gradients = of_hidden, of_weight, of_bias
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.gradients), None, None


def _loss_and_gradient(logits: Tensor, picked: Tensor, taught: Taught | None, part: slice) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient `(tokens, vocabulary)`, in the logits' memory; picked (tokens, 1)."""
    answers = None if taught is None else log_softmax_of(taught.logits(part), taught.temperature)
    said = None if taught is None else log_softmax_of(logits, taught.temperature)
    normaliser = logits.logsumexp(-1, keepdim=True)  # (tokens, 1)
    loss = (normaliser - logits.gather(1, picked)).sum()
    # The gradient of -log softmax(z)[t] in z is softmax(z), less 1 at t.
    gradient = logits.sub_(normaliser).exp_()
    gradient.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
    if taught is None or answers is None or said is None:
        return loss, gradient
    wanted = answers.exp()
    apart = (wanted * (answers - said)).sum()
    alpha, temperature = taught.alpha, taught.temperature
    # The gradient of KL(p || softmax(z / T)) in z is (softmax(z / T) - p) / T.
    of_apart = said.exp_().sub_(wanted)
    return (
        (1 - alpha) * loss + alpha * temperature**2 * apart,
        gradient.mul_(1 - alpha).add_(of_apart, alpha=alpha * temperature),
    )


def log_softmax_of(logits: Tensor, temperature: float) -> Tensor:
    """The log probabilities `(…, vocabulary)` at a temperature, in float32."""
    return (logits.float() / temperature).log_softmax(-1)


def linear_cross_entropy(
    hidden: Tensor, head: torch.nn.Linear, targets: Tensor, ignored: int, taught: Taught | None = None
) -> Tensor:
    """The summed loss of the tokens whose target is not `ignored`; only those pass through the head.

    hidden (tokens, d), targets (tokens); the logits of `taught` are those of the tokens that are not ignored.
    """
    kept = targets != ignored
    total: Tensor = LinearCrossEntropy.apply(hidden[kept], head.weight, head.bias, targets[kept], taught)
    return total


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, taught: Taught) -> Tensor:
    """The same loss from logits `(tokens, vocabulary)` that are there already, by autograd."""
    kept = targets != ignored
    said = logits[kept].float()
    loss = functional.cross_entropy(said, targets[kept], reduction="sum")
    answers = log_softmax_of(taught.logits(slice(None)), taught.temperature)
    apart = (answers.exp() * (answers - log_softmax_of(said, taught.temperature))).sum()
    return (1 - taught.alpha) * loss + taught.alpha * taught.temperature**2 * apart

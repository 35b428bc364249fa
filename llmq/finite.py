"""The first number that is not finite stops a training; the error names the step and the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor

CURE = "lower learning_rate"


def check_loss(loss: float, step: int, kept: Path | None = None, of: str = "") -> None:
    """Raise `LlmqError` for a loss that is not finite."""
    if not math.isfinite(loss):
        raise LlmqError(f"the loss{of} of step {step} is not a finite number; {advice(kept)}")


def check_gradients(named: Iterable[tuple[str, Tensor]], step: int, kept: Path | None = None, of: str = "") -> None:
    """Raise `LlmqError` for the first gradient that is not finite, of parameters by name."""
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    if name := first_not_finite(gradients):
        raise LlmqError(f"the gradient of {name}{of} in step {step} is not finite; {advice(kept)}")


def check_weights(named: Iterable[tuple[str, Tensor]], step: int, kept: Path | None = None, of: str = "") -> None:
    """Raise `LlmqError` for the first tensor of a trained network that is not finite."""
    if name := first_not_finite(dict(named)):
        raise LlmqError(f"after step {step} {name}{of} is not finite; {advice(kept)}")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that holds a value that is not finite; empty if none does."""
    import torch

    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return ""
    # The maximum norm keeps NaN and infinity, and no sum overflows. The device is waited for once.
    largest = torch._foreach_norm(list(floats.values()), float("inf"))
    if bool(torch.stack([each.isfinite().to(largest[0].device) for each in largest]).all()):
        return ""
    return next(name for name, each in zip(floats, largest, strict=True) if not bool(each.isfinite()))


def advice(kept: Path | None) -> str:
    """The cure, and the checkpoint to resume from if one is kept."""
    return CURE + (f"; the last whole checkpoint is kept in {kept}" if kept else "")

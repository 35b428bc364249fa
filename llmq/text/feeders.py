"""The feeder of a group of layers: the norm or linear layer whose channels can take scales from the group.

A feeder gives channel `i` of the input of the group. Nothing changes if the channel is divided by `s_i` and column `i`
of each layer of the group is multiplied by `s_i`. A trial on one batch, not a list of names, finds the feeder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.text.skeleton import Skeleton

    Look = Callable[[], tuple[Mapping[str, Tensor], Tensor]]

TOLERANCE = 0.01
"""Outputs that differ by less, as a share of their norm, are the same but for rounding."""


@dataclass(frozen=True)
class Feeder:
    """A norm or a linear layer by its name. The factor of a channel is `offset + weight`: a Gemma's norm adds 1."""

    name: str
    offset: float = 0.0

    def divided(self, source: Skeleton, scales: Tensor) -> dict[str, Tensor]:
        """The parameters with which the outputs of the feeder are divided by `scales` `[channels]`."""
        parameters = {}
        for name, p in source.module.get_submodule(self.name).named_parameters(prefix=self.name, recurse=False):
            shift = self.offset if name == f"{self.name}.weight" else 0.0  # a bias has no offset
            each = scales.view(-1, *[1] * (p.ndim - 1))  # p is (channels,), (channels, inputs) or a convolution's
            parameters[name] = ((p.data.float() + shift) / each - shift).to(p.dtype)
        return parameters

    def divide(self, source: Skeleton, scales: Tensor) -> Tensor:
        """Divide the outputs of a feeder by `scales`. Returns the scales in force after a norm's weight was rounded."""
        factors = source.weight(self.name).float() + self.offset  # (channels,) or (channels, inputs)
        for name, tensor in self.divided(source, scales).items():
            source.set(name, tensor)
        divided = source.weight(self.name).float() + self.offset
        if factors.ndim > 1:  # a linear layer: its weights are rounded one by one, without a common factor
            return scales
        return (factors / divided).where((factors != 0) & (divided != 0), scales)


def feeders_of(source: Skeleton, block: str, groups: Sequence[Sequence[str]], look: Look) -> list[Feeder | None]:
    """The feeder of each group of layers of a loaded block; None if there is none, or if others read the output too.

    `look` runs a batch through the block, and returns the input of each linear layer and the output of the block.
    """
    import torch

    called: list[str] = []
    modules = dict(source.module.get_submodule(block).named_modules(prefix=block))
    weighted = [name for name, module in modules.items() if hasattr(module, "weight")]
    hooks = [modules[n].register_forward_pre_hook(lambda *_, n=n: called.append(n)) for n in weighted]
    inputs, output = look()
    for hook in hooks:
        hook.remove()

    def tried(name: str, group: Sequence[str]) -> Feeder | None:
        before = inputs[group[0]]  # (..., channels)
        own = source.module.get_submodule(name).named_parameters(prefix=name, recurse=False)
        # A feeder whose parameters are 0 gives zeros, but for a norm that adds 1 to its weight.
        with _replaced(source, {n: torch.zeros_like(p) for n, p in own}):
            silent = not bool(look()[0][group[0]].any())
        if not silent and source.weight(name).ndim > 1:
            return None
        feeder = Feeder(name, 0.0 if silent else 1.0)
        scales = torch.ones(before.shape[-1], device=before.device)
        scales[::2] = 2  # neighbours differ, so that a candidate whose channels are mixed fails
        columns = {f"{layer}.weight": (source.weight(layer) * scales).to(source.dtype) for layer in group}
        with _replaced(source, feeder.divided(source, scales) | columns):
            after, same = look()
        fits = _apart(after[group[0]] * scales, before) < TOLERANCE and _apart(same, output) < TOLERANCE
        return feeder if fits else None

    feeders: list[Feeder | None] = []
    for group in groups:
        width, is_reached = source.linear(group[0]).in_features, bool(inputs[group[0]].any())
        earlier = reversed(called[: called.index(group[0])]) if is_reached else ()  # the nearest first
        candidates = (tried(name, group) for name in earlier if len(source.weight(name)) == width)
        feeders.append(next(filter(None, candidates), None))
    return feeders


@contextmanager
def _replaced(source: Skeleton, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    kept = {name: source.module.get_parameter(name).data for name in tensors}
    for name, tensor in tensors.items():
        source.set(name, tensor)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            source.set(name, tensor)


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:  # a router chose other experts
        return float("inf")
    return float((one.float() - other.float()).norm() / other.float().norm())

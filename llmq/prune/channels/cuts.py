"""Cuts: the channels of a group that go, the proof that taking them out changes nothing else, and taking them out.

The proof: a network computes the same without channels that no layer reads. Two copies with random weights are
compared: one lacks the channels, the other has zeros for them in every layer that reads them. The outputs differ where
channels were counted otherwise than they are used, as after a shuffle, and then the channels stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import floor, lcm
from typing import TYPE_CHECKING

from llmq.prune.channels.graph import Group
from llmq.vision.shapes import Which, kind_of, narrow, places

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import GroupNorm, Linear, Module
    from torch.nn.modules.conv import _ConvNd

TOLERANCE = 1e-3
"""The largest difference that passes, as a share of the largest output: rounding is far below, a mistake far above."""


@dataclass(frozen=True)
class Cut:
    """The channels of a group that go."""

    group: Group
    gone: frozenset[int]


def least_important(scores: Sequence[float], ratio: float, round_to: int, parts: int = 1) -> frozenset[int]:
    """The channels with the least scores, so many that about `1 - ratio` stay: the nearest multiple of `round_to`.

    With several `parts` the same places go in each part: the places with the least sums of scores.
    """
    step, each = lcm(round_to, parts), len(scores) // parts
    stay = max(step, floor((1 - ratio) * len(scores) / step + 0.5) * step)
    if stay >= len(scores):
        return frozenset()
    sums = [sum(scores[i::each]) for i in range(each)]  # of one place in all parts
    gone = sorted(range(each), key=sums.__getitem__)[: each - stay // parts]
    return frozenset(part * each + place for part in range(parts) for place in gone)


def take_out(network: Module, cuts: Iterable[Cut]) -> None:
    """Take the channels of cuts out of a network, in place."""
    for (name, side), gone in _places_of(cuts).items():
        narrow(network.get_submodule(name), side, gone)


def _silence(network: Module, cuts: Iterable[Cut]) -> None:
    """Give every layer that reads these channels zeros for them, in place."""
    for (name, side), gone in _places_of(cuts).items():
        layer = network.get_submodule(name)
        kind = kind_of(layer)
        if side == "inputs" and kind is not None and kind.inputs is not kind.outputs:
            ((tensor, (dimension, indices)),) = places(layer, side, gone).items()
            getattr(layer, tensor).data.movedim(dimension, 0)[indices] = 0


def _places_of(cuts: Iterable[Cut]) -> dict[tuple[str, Which], set[int]]:
    """The channels that go, for each side of each layer."""
    gone: dict[tuple[str, Which], set[int]] = {}
    for cut in cuts:
        for layer, side, of in cut.group.members:
            gone.setdefault((layer, side), set()).update(i for i, channel in of.items() if channel in cut.gone)
    return gone


def widths(network: Module) -> dict[str, int]:
    """The number of output channels of each convolution and linear layer."""
    found = {n: getattr(m, "out_channels", getattr(m, "out_features", 0)) for n, m in network.named_modules()}
    return {name: width for name, width in found.items() if width and kind_of(network.get_submodule(name))}


def figures(network: Module, example: Tensor) -> dict[str, int]:
    """The number of parameters, and of multiplications in convolutions and linear layers for an example."""
    import torch
    from torch import nn

    total = 0

    def count(layer: _ConvNd | Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        # Each weight meets every place of the output; of a transposed convolution, of the input.
        at = inputs[0] if getattr(layer, "transposed", False) else output
        width = at.shape[-1] if isinstance(layer, nn.Linear) else at.shape[1]
        total += at.numel() // width * layer.weight.numel()

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    return {"macs": total, "parameters": sum(p.numel() for p in network.parameters())}


def proven(network: Module, example: Tensor, cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts that change nothing else. All are tried at once; cuts that fail together are tried in halves."""
    if not cuts or _holds(_random(network), example, cuts):
        return list(cuts)
    half = len(cuts) // 2
    return proven(network, example, cuts[:half]) + proven(network, example, cuts[half:]) if half else []


def _holds(network: Module, example: Tensor, cuts: Sequence[Cut]) -> bool:
    import torch

    cut = deepcopy(network)
    with torch.no_grad():
        _silence(network, cuts)
        whole = outputs(network, example)
        try:
            take_out(cut, cuts)
            without = outputs(cut, example)
        except (RuntimeError, ValueError):  # torch's, transformers': shapes that do not go together
            return False
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
        for a, b in zip(whole, without, strict=True)
    )


def outputs(network: Module, example: Tensor) -> list[Tensor]:
    """The outputs of a network for an example, as a list."""
    made = network(example)
    return list(made) if isinstance(made, tuple | list) else [made]


def _random(network: Module) -> Module:
    """A copy with random weights, about as large as fresh ones. Trained weights can hide a channel, as zeros do.

    A group normalization mixes channels: the result for those that stay depends on those that go. In the copy it only
    scales.
    """
    import torch

    # LeViT keeps tensors of the last call, which cannot be copied; setting the mode drops them.
    copy = deepcopy(network.eval())
    generator = torch.Generator().manual_seed(0)
    for layer in copy.modules():
        if reset := getattr(layer, "reset_running_stats", None):
            reset()
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = _Scales(layer)  # type: ignore[method-assign, assignment]
    for name, tensor in copy.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        fan_in = max(1, tensor.numel() // max(1, len(tensor)))  # inputs of an output
        scaled = noise * (2 / fan_in) ** 0.5 if tensor.dim() > 1 else noise * 0.1 + (not name.endswith("bias"))
        tensor.data.copy_(scaled)
    return copy


class _Scales:
    """A group normalization without the normalization."""

    def __init__(self, layer: GroupNorm):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:  # (n, channels, …)
        if self.layer.weight is None:
            return x
        shape = (1, -1, *[1] * (x.dim() - 2))
        scaled = x * self.layer.weight.view(shape)
        return scaled if self.layer.bias is None else scaled + self.layer.bias.view(shape)

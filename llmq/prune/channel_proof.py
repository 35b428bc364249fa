"""The proof that taking channels out of a network changes nothing else.

Were the channels that go read by nobody, the network would compute what it computes without them. So two copies with
random weights are compared: one without the channels, one in which every layer that reads them has zeros for them. They
differ where channels were counted otherwise than they are used, as after a shuffle, and then those channels stay.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from llmq.prune.channel_cuts import Cut, silence, take_out

TOLERANCE = 1e-3
"""Of the largest output: what is left of rounding is a thousandth of that, and of a mistake more than a tenth."""


def proven(network: Any, example: Any, cuts: Sequence[Cut]) -> list[Cut]:
    """Those cuts that change nothing else, tried all together, and where that fails in halves."""
    if not cuts or _holds(_random(network), example, cuts):
        return list(cuts)
    half = len(cuts) // 2
    return proven(network, example, cuts[:half]) + proven(network, example, cuts[half:]) if half else []


def _holds(network: Any, example: Any, cuts: Sequence[Cut]) -> bool:
    import torch

    cut = deepcopy(network)
    with torch.no_grad():
        silence(network, cuts)
        whole = outputs(network, example)
        try:
            take_out(cut, cuts)
            without = outputs(cut, example)
        except (RuntimeError, ValueError):  # torch's, transformers': shapes that do not go together
            return False
    return all(_near(a, b) for a, b in zip(whole, without, strict=True))


def outputs(network: Any, example: Any) -> list[Any]:
    """What a network makes of an example, as a list of tensors."""
    made = network(example)
    return list(made) if isinstance(made, tuple | list) else [made]


def _near(one: Any, other: Any) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def _random(network: Any) -> Any:
    """A copy with random weights of about the size of fresh ones: given ones can hide a channel, as zeros do.

    A group normalization mixes channels, so that those which stay feel that others go; the copy has only its scales.
    """
    import torch

    # LeViT keeps tensors of its last call, which cannot be copied; told its mode, it forgets them.
    copy = deepcopy(network.eval())
    generator = torch.Generator().manual_seed(0)
    for layer in copy.modules():
        if hasattr(layer, "reset_running_stats"):
            layer.reset_running_stats()
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = _Scales(layer)
    for name, tensor in copy.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        fan_in = max(1, tensor.numel() // max(1, len(tensor)))
        scaled = noise * (2 / fan_in) ** 0.5 if tensor.dim() > 1 else noise * 0.1 + (not name.endswith("bias"))
        tensor.data.copy_(scaled)
    return copy


class _Scales:
    """A group normalization without the normalization."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        if self.layer.weight is None:
            return x
        shape = (1, -1, *[1] * (x.dim() - 2))
        scaled = x * self.layer.weight.view(shape)
        return scaled if self.layer.bias is None else scaled + self.layer.bias.view(shape)

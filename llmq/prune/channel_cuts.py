"""Which channels go, and taking them out of a network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, lcm
from typing import Any

from llmq.models.shapes import Which, kind_of, narrow, places
from llmq.prune.channel_groups import Group


@dataclass(frozen=True)
class Cut:
    """The channels of a group that go."""

    group: Group
    gone: frozenset[int]


def least_important(scores: Sequence[float], ratio: float, round_to: int, parts: int = 1) -> frozenset[int]:
    """The channels with the least scores, so many that about `1 - ratio` stay: the nearest multiple of `round_to`.

    Where there are several `parts` the same places go in each, those with the least sum of scores.
    """
    step, each = lcm(round_to, parts), len(scores) // parts
    stay = max(step, floor((1 - ratio) * len(scores) / step + 0.5) * step)
    if stay >= len(scores):
        return frozenset()
    sums = [sum(scores[i::each]) for i in range(each)]
    gone = sorted(range(each), key=sums.__getitem__)[: each - stay // parts]
    return frozenset(part * each + place for part in range(parts) for place in gone)


def places_of(cuts: Iterable[Cut]) -> dict[tuple[str, Which], set[int]]:
    """The channels that go, of each side of each layer."""
    found: dict[tuple[str, Which], set[int]] = {}
    for cut in cuts:
        for member in cut.group.members:
            gone = {i for i, of in zip(member.channels, member.of, strict=True) if of in cut.gone}
            found.setdefault((member.layer, member.side), set()).update(gone)
    return found


def take_out(network: Any, cuts: Iterable[Cut]) -> None:
    """Take channels out of a network, in place."""
    for (name, side), gone in places_of(cuts).items():
        narrow(network.get_submodule(name), side, gone)


def silence(network: Any, cuts: Iterable[Cut]) -> None:
    """Let nothing that reads these channels make anything of them, in place."""
    for (name, side), gone in places_of(cuts).items():
        layer = network.get_submodule(name)
        kind = kind_of(layer)
        if side == "inputs" and kind is not None and kind.inputs is not kind.outputs:
            ((tensor, (dimension, indices)),) = places(layer, side, gone).items()
            getattr(layer, tensor).data.movedim(dimension, 0)[indices] = 0


def widths(network: Any) -> dict[str, int]:
    """The number of outputs of each convolution and linear layer."""
    names = ("out_channels", "out_features")
    found = {n: next((getattr(m, a) for a in names if hasattr(m, a)), None) for n, m in network.named_modules()}
    return {name: width for name, width in found.items() if width and kind_of(network.get_submodule(name))}


def figures(network: Any, example: Any) -> dict[str, int]:
    """Parameters, and the multiplications that convolutions and linear layers make of an example."""
    import torch
    from torch import nn

    total = 0

    def count(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
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

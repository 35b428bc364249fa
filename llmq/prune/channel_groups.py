"""Which channels of a network hang together, read off its dependency graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from llmq.models.shapes import DEPTHWISE, Which, channels_of, has_channels, kind_of
from llmq.prune.channel_graph import after_shuffles, graph_of


@dataclass(frozen=True)
class Member:
    """One side of a layer that has channels of a group: `channels[i]` is the group's channel `of[i]`."""

    layer: str
    side: Which
    channels: tuple[int, ...]
    of: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that can only go together: from the layers that make them, and from those that read them.

    `makers` are the convolutions and linear layers whose outputs they are. Where a grouped convolution or normalization
    is among them, all `parts` lose the same places. `joined` says that something is added to them on their way.
    """

    members: tuple[Member, ...]
    makers: tuple[str, ...]
    parts: int
    joined: bool
    scores: tuple[float, ...]


def find_groups(network: Any, example: Any, importance: Any) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be pruned as far as shapes tell, and why each of the other layers cannot, by its name.

    `importance` is one of torch-pruning's.
    """
    graph = graph_of(network, example)
    names = {module: name for name, module in network.named_modules()}
    groups: list[Group] = []
    left: dict[str, str] = {}
    for first in graph.get_all_groups():
        found = after_shuffles(first, graph)
        items = [(item.dep, item.idxs, item.root_idxs) for item in found]
        layers = [dep.target.module for dep, *_ in items]
        sides = [_side(dep.handler, graph) for dep, *_ in items]
        made = [s == "outputs" and _makes(layer) for s, layer in zip(sides, layers, strict=True)]
        makers = tuple(names[layer] for layer, makes in zip(layers, made, strict=True) if makes)
        reason = next(filter(None, (_hinders(dep, indices, of, graph) for dep, indices, of in items)), None)
        scores = None if reason else importance(found)
        if reason or scores is None:
            why = reason or "nothing in its group tells its channels apart by this importance"
            left |= dict.fromkeys(makers, why)
            continue
        members = tuple(
            Member(names[layer], side, tuple(indices), tuple(of))
            for layer, side, (_, indices, of) in zip(layers, sides, items, strict=True)
            if has_channels(layer)
        )
        joined = any(str(getattr(layer, "_grad_fn", "")).startswith("AddBackward") for layer in layers)
        groups.append(Group(members, makers, lcm(*map(_parts, layers)), joined, tuple(scores.tolist())))
    return groups, left


def _makes(layer: Any) -> bool:
    return hasattr(layer, "in_channels") or hasattr(layer, "in_features")


def _side(handler: Callable[..., Any], graph: Any) -> Which:
    return "outputs" if graph.is_out_channel_pruning_fn(handler) else "inputs"


def _parts(layer: Any) -> int:
    """Among how many equal parts of its channels a layer must not be lopsided."""
    groups = 1 if kind_of(layer) is DEPTHWISE else getattr(layer, "groups", 1)
    return int(getattr(layer, "num_groups", groups))


def _hinders(dep: Any, indices: Sequence[int], of: Sequence[int | None], graph: Any) -> str | None:
    """Why the channels of a layer or operation cannot go, if so."""
    from torch import nn

    layer = dep.target.module
    reads = _makes(layer) and kind_of(layer) is not DEPTHWISE and _side(dep.handler, graph) == "inputs"
    if not dep.target.outputs and not reads:
        return "what it makes is the network's output"
    if isinstance(layer, nn.Parameter):
        return "its channels meet a parameter outside of layers"
    if isinstance(layer, nn.LayerNorm | nn.Embedding | nn.MultiheadAttention | nn.LSTM):
        return f"its channels meet a {type(layer).__name__}"
    if not has_channels(layer):
        return None
    channels = channels_of(layer, _side(dep.handler, graph))
    if None in of or len(set(indices)) < len(indices) or max(indices) >= channels:
        return "between it and the next layer channels become something else"
    if _parts(layer) > 1 and (len(indices) < channels or list(indices) != list(of)):
        return "its channels meet those of others in a layer that has groups of channels"
    return None

"""Which channels of a network hang together, read off its dependency graph."""

from dataclasses import dataclass
from math import lcm
from typing import Any

from llmq.models.shapes import DEPTHWISE, Which, channels_of, has_channels, kind_of
from llmq.prune.channel_graph import Reached, graph_of, hinders, reach_after_shuffles


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
    seen: set[str] = set()
    for layer in list(graph.module2node):
        if layer not in names or names[layer] in seen or not _makes(layer):
            continue
        found, tied = reach_after_shuffles(graph, layer)
        makers = tuple(names[here.layer] for here in found if here.side == "outputs" and _makes(here.layer))
        seen |= {names[layer], *makers}
        reason = next(filter(None, map(hinders, found)), None) or _lopsided(found, tied)
        scores = None if reason else importance(_as_group(found))
        if scores is not None:
            groups.append(_group(found, makers, names, scores))
        else:
            why = reason or "nothing in its group tells its channels apart by this importance"
            left |= dict.fromkeys(makers, why)
    return groups, left


def _group(found: list[Reached], makers: tuple[str, ...], names: dict[Any, str], scores: Any) -> Group:
    members = tuple(
        Member(names[here.layer], here.side, tuple(here.of), tuple(here.of.values()))  # type: ignore[arg-type]
        for here in found
        if has_channels(here.layer)
    )
    joined = any(str(getattr(here.layer, "_grad_fn", "")).startswith("AddBackward") for here in found)
    parts = lcm(*(_parts(here.layer) for here in found))
    return Group(members, makers, parts, joined, tuple(scores.tolist()))


def _as_group(found: list[Reached]) -> Any:
    """As torch-pruning's importances take it."""
    from torch_pruning.dependency import Group as Items

    items = Items()
    for i, here in enumerate(found):
        items.add_dep(here.dep, list(here.of))
        items[i].root_idxs = list(here.of.values())
    return items


def _makes(layer: Any) -> bool:
    return kind_of(layer) is not None and (hasattr(layer, "in_channels") or hasattr(layer, "in_features"))


def _parts(layer: Any) -> int:
    """Among how many equal parts of its channels a layer must not be lopsided."""
    groups = 1 if kind_of(layer) is DEPTHWISE else getattr(layer, "groups", 1)
    return int(getattr(layer, "num_groups", groups))


def _lopsided(found: list[Reached], tied: bool) -> str | None:
    if tied:
        return "between it and the next layer channels become something else"
    for here in found:
        own = len(here.of) == channels_of(here.layer, here.side) if _parts(here.layer) > 1 else True
        if not own or (_parts(here.layer) > 1 and any(i != of for i, of in here.of.items())):
            return "its channels meet those of others in a layer that has groups of channels"
    return None

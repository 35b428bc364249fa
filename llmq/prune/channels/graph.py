"""Groups of channels that hang together, read off torch-pruning's dependency graph (Fang et al. 2023).

The library's own search passes an operation once for each path that leads there, and a detector's pyramid has many; the
search here sees every channel of every layer once. The graph learns here of splits, shuffles and frozen layers that the
library does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from llmq.vision.shapes import DEPTHWISE, FROZEN_NORM, Which, channels_of, has_channels, kind_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch_pruning import DependencyGraph
    from torch_pruning.dependency import Dependency, Node
    from torch_pruning.importance import Importance

CHANGED = "between it and the next layer channels become something else"


class Member(NamedTuple):
    """One side of a layer that has channels of a group: `of[i]` is the channel of the group that channel `i` is."""

    layer: str
    side: Which
    of: Mapping[int, int]


@dataclass(frozen=True)
class Group:
    """Channels that can only go together: from the layers that make them, and from those that read them.

    `makers` are the convolutions and linear layers that output the channels. With a grouped convolution or
    normalization in the group, all `parts` lose the same places. `joined` is True if an addition reads the channels.
    """

    members: tuple[Member, ...]
    makers: tuple[str, ...]
    parts: int
    joined: bool
    scores: tuple[float, ...]


class Index(NamedTuple):
    """A channel of a layer or operation, and the channel of the first layer on which this one depends."""

    idx: int
    root_idx: int | None


@dataclass
class Reached:
    """One side of a layer or operation that the search reached; `of` maps its channels to those of the first layer."""

    dep: Dependency
    side: Which
    of: dict[int, int | None] = field(default_factory=dict)

    @property
    def layer(self) -> Module:
        """The module, or the object that stands for an operation."""
        module: Module = self.dep.target.module
        return module


def find_groups(network: Module, example: Tensor, importance: Importance) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be pruned as far as shapes tell, and the reason why each of the other layers stays."""
    graph = _graph_of(network, example)
    names = {module: name for name, module in network.named_modules()}
    groups: list[Group] = []
    left: dict[str, str] = {}
    seen: set[str] = set()
    for layer in list(graph.module2node):
        if layer not in names or names[layer] in seen or not _makes(layer):
            continue
        reached, tied = _reach_after_shuffles(graph, layer)
        makers = tuple(names[side.layer] for side in reached if side.side == "outputs" and _makes(side.layer))
        seen |= {names[layer], *makers}
        reason = next(filter(None, map(_hindrance, reached)), None) or (CHANGED if tied else _lopsided(reached))
        scores = None if reason else importance(_as_group(reached))
        if scores is None:
            left |= dict.fromkeys(makers, reason or "nothing in its group tells its channels apart by this importance")
            continue
        members = [Member(names[s.layer], s.side, s.of) for s in reached if has_channels(s.layer)]  # type: ignore[arg-type]
        joined = any(str(getattr(side.layer, "_grad_fn", "")).startswith("AddBackward") for side in reached)
        parts = lcm(*(_parts(side.layer) for side in reached))
        groups.append(Group(tuple(members), makers, parts, joined, tuple(scores.tolist())))
    return groups, left


def _graph_of(network: Module, example: Tensor) -> DependencyGraph:
    import torch
    from torch_pruning import DependencyGraph
    from torch_pruning.pruner.function import BatchnormPruner

    class FrozenNorm(BatchnormPruner):  # type: ignore[misc]
        def get_out_channels(self, layer: Module) -> int:
            return channels_of(layer, "outputs")

        get_in_channels = get_out_channels

    frozen = {type(layer) for layer in network.modules() if kind_of(layer) is FROZEN_NORM}
    with torch.enable_grad():  # autograd records the operations
        graph = DependencyGraph().build_dependency(
            network,
            example,
            forward_fn=lambda net, x: net(x),
            customized_pruners={cls: FrozenNorm() for cls in frozen},
            verbose=False,
        )
    nodes = graph.module2node.values()
    for node in nodes:
        node.gets_out = False  # True if channels leave the network and no layer reads them before
        if _shuffles(node):
            _teach_shuffle(node, node.grad_fn._saved_upscale_factor**2)
    stack = [node for node in nodes if not node.outputs]  # backwards from the outputs
    while stack:
        node = stack.pop()
        if not node.gets_out:
            node.gets_out = True
            stack += [] if _reads(node.module) else node.inputs
    return graph


def _shuffles(node: Node) -> bool:
    return str(getattr(node.module, "_grad_fn", "")) == "PixelShuffleBackward0"


def _teach_shuffle(node: Node, each: int) -> None:
    """Teach the graph that a pixel shuffle makes one channel of `each` neighbouring channels."""

    def gather(indices: Sequence[Index]) -> list[Index]:
        return [i._replace(idx=i.idx // each) for i in indices]

    def spread(indices: Sequence[Index]) -> list[Index]:
        return [i._replace(idx=i.idx * each + place) for i in indices for place in range(each)]

    for before in node.inputs:
        _map(before, node, gather)
        _map(node, before, spread)


def _map(source: Node, target: Node, mapping: Callable[[Sequence[Index]], list[Index]]) -> None:
    for dependency in source.dependencies:
        if dependency.target is target:
            dependency.index_mapping[0] = mapping


def _reach_after_shuffles(graph: DependencyGraph, layer: Module) -> tuple[list[Reached], bool]:
    """All sides that depend on the outputs of a layer, counted in channels after a pixel shuffle, if there is one."""
    reached, tied = _reach(graph, layer, "outputs")
    if not tied or any(map(_hindrance, reached)) or not any(_shuffles(side.dep.target) for side in reached):
        return reached, tied
    fewest = min((side for side in reached if has_channels(side.layer)), key=lambda side: len(side.of))
    return _reach(graph, fewest.layer, fewest.side)


def _reach(graph: DependencyGraph, layer: Module, side: Which) -> tuple[list[Reached], bool]:
    """All sides that depend on the channels of one side of a layer, and True if those depend on one another.

    The search ends at the first thing that cannot be pruned.
    """
    from torch_pruning.dependency import Dependency

    pruner, node = graph.get_pruner_of_module(layer), graph.module2node[layer]
    handler = pruner.prune_out_channels if side == "outputs" else pruner.prune_in_channels
    every = [Index(i, i) for i in range(channels_of(layer, side))]  # each depends on itself
    stack: list[tuple[Dependency, list[Index]]] = [(Dependency(handler, handler, node, node), every)]
    reached: dict[tuple[Node, object], Reached] = {}
    tied = False
    while stack:
        dep, indices = stack.pop()
        which: Which = "outputs" if graph.is_out_channel_pruning_fn(dep.handler) else "inputs"
        here = reached.setdefault((dep.target, dep.handler), Reached(dep, which))
        # Two channels of the first layer are tied if one channel depends on both.
        tied = tied or any(here.of.get(i.idx, i.root_idx) != i.root_idx for i in indices)
        new = list({i.idx: i for i in reversed(indices) if i.idx not in here.of}.values())[::-1]
        tied = tied or len(new) < sum(i.idx not in here.of for i in indices)
        here.of |= {i.idx: i.root_idx for i in new}
        if _hindrance(here):
            break
        stack += _onward(dep, new) if new else []
    return list(reached.values()), tied


def _onward(dep: Dependency, indices: list[Index]) -> Iterator[tuple[Dependency, list[Index]]]:
    for after in dep.target.dependencies:
        if after.is_triggered_by(dep.handler):
            moved = indices
            for mapping in filter(None, after.index_mapping):
                # For a split that is split again the graph does not know where each part begins.
                known = len(getattr(mapping, "offset", (0, 0))) == 2
                moved = mapping(moved) if known else [Index(i.idx, None) for i in moved]
            if moved:
                yield after, moved


def _hindrance(here: Reached) -> str | None:
    """The reason why the channels of one side must stay; None if they may go."""
    from torch import nn

    if here.dep.target.gets_out and not (here.side == "inputs" and _reads(here.layer)):
        return "its outputs are the network's output"
    if isinstance(here.layer, nn.Parameter):
        return "its channels meet a parameter outside of layers"
    if isinstance(here.layer, nn.LayerNorm | nn.Embedding | nn.MultiheadAttention | nn.LSTM):
        return f"its channels meet a {type(here.layer).__name__}"
    if has_channels(here.layer) and (None in here.of.values() or max(here.of) >= channels_of(here.layer, here.side)):
        return CHANGED
    return None


def _lopsided(reached: Sequence[Reached]) -> str | None:
    for here in (side for side in reached if _parts(side.layer) > 1):
        if len(here.of) != channels_of(here.layer, here.side) or any(i != of for i, of in here.of.items()):
            return "its channels meet those of others in a layer that has groups of channels"
    return None


def _parts(layer: Module) -> int:
    """The number of equal parts of the channels that must lose the same places."""
    groups = 1 if kind_of(layer) is DEPTHWISE else getattr(layer, "groups", 1)
    return int(getattr(layer, "num_groups", groups))  # of a GroupNorm


def _reads(layer: Module) -> bool:
    """True if a layer makes new channels of those that come in."""
    kind = kind_of(layer)
    return kind is not None and kind.inputs is not kind.outputs


def _makes(layer: Module) -> bool:
    return kind_of(layer) is not None and (hasattr(layer, "in_channels") or hasattr(layer, "in_features"))


def _as_group(reached: Sequence[Reached]) -> object:
    """The sides as the argument of torch-pruning's importances."""
    from torch_pruning.dependency import Group as Items

    items = Items()
    for i, side in enumerate(reached):
        items.add_dep(side.dep, list(side.of))
        items[i].root_idxs = list(side.of.values())
    return items

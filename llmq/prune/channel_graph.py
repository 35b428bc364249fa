"""torch-pruning's dependency graph (Fang et al. 2023), taught what it takes for an elementwise operation.

Its own search for the channels that hang together goes through one operation again and again where many paths lead to
it, as in a detector's pyramid; the one here sees every channel of every layer once.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmq.models.shapes import FROZEN_NORM, Which, channels_of, has_channels, kind_of, narrow


def graph_of(network: Any, example: Any) -> Any:
    """The dependency graph of what a network makes of an example."""
    import torch
    from torch_pruning import DependencyGraph

    frozen = {type(layer) for layer in network.modules() if kind_of(layer) is FROZEN_NORM}
    with torch.enable_grad():
        graph = DependencyGraph().build_dependency(
            network,
            example,
            forward_fn=lambda net, x: net(x),
            customized_pruners={cls: _frozen_norm() for cls in frozen},
            verbose=False,
        )
    for node in graph.module2node.values():
        if _shuffles(node):
            _teach_shuffle(node, node.grad_fn._saved_upscale_factor**2)
    _mark_outputs(graph.module2node.values())
    return graph


def _mark_outputs(nodes: Collection[Any]) -> None:
    """Note of each node whether what it makes gets out of the network without being read by a layer."""
    stack = [node for node in nodes if not node.outputs]
    for node in nodes:
        node.gets_out = False
    while stack:
        node = stack.pop()
        if not node.gets_out:
            node.gets_out = True
            stack += [] if _reads(node.module) else node.inputs


def _reads(layer: Any) -> bool:
    """Whether it makes channels of its own out of those that come in."""
    kind = kind_of(layer)
    return kind is not None and kind.inputs is not kind.outputs


def _frozen_norm() -> Any:
    from torch_pruning.pruner.function import BasePruningFunc

    class FrozenNorm(BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            narrow(layer, "outputs", idxs)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return channels_of(layer, "outputs")

        get_in_channels = get_out_channels

    return FrozenNorm()


def _shuffles(node: Any) -> bool:
    return str(getattr(node.module, "_grad_fn", "")) == "PixelShuffleBackward0"


def _teach_shuffle(node: Any, each: int) -> None:
    """A pixel shuffle makes one channel of `each` neighbouring ones."""

    def gather(indices: Sequence[Any]) -> list[Any]:
        return [i._replace(idx=i.idx // each) for i in indices]

    def spread(indices: Sequence[Any]) -> list[Any]:
        return [i._replace(idx=i.idx * each + place) for i in indices for place in range(each)]

    for before in node.inputs:
        _map(before, node, gather)
        _map(node, before, spread)


def _map(source: Any, target: Any, mapping: Callable[[Sequence[Any]], list[Any]]) -> None:
    for dependency in source.dependencies:
        if dependency.target is target:
            dependency.index_mapping[0] = mapping


class Index(NamedTuple):
    """A channel of a layer or operation, and the channel of the first layer that it hangs on."""

    idx: int
    root_idx: int | None


@dataclass
class Reached:
    """One side of a layer or operation that was reached, and which channels of the first layer its own hang on."""

    dep: Any
    side: Which
    of: dict[int, int | None] = field(default_factory=dict)

    @property
    def layer(self) -> Any:
        """The module, or what stands for an operation."""
        return self.dep.target.module


def reach(graph: Any, layer: Any, side: Which) -> tuple[list[Reached], bool]:
    """All that hangs on the channels of one side of a layer, and whether these hang on one another.

    The search ends at the first thing that cannot be pruned.
    """
    from torch_pruning.dependency import Dependency

    pruner, node = graph.get_pruner_of_module(layer), graph.module2node[layer]
    handler = pruner.prune_out_channels if side == "outputs" else pruner.prune_in_channels
    every = [Index(i, i) for i in range(channels_of(layer, side))]
    stack: list[tuple[Any, list[Any]]] = [(Dependency(handler, handler, node, node), every)]
    found: dict[Any, Reached] = {}
    tied = False
    while stack:
        dep, indices = stack.pop()
        which: Which = "outputs" if graph.is_out_channel_pruning_fn(dep.handler) else "inputs"
        here = found.setdefault((dep.target, dep.handler), Reached(dep, which))
        tied = tied or any(here.of.get(i.idx, i.root_idx) != i.root_idx for i in indices)
        new = list({i.idx: i for i in reversed(indices) if i.idx not in here.of}.values())[::-1]
        tied = tied or len(new) < sum(i.idx not in here.of for i in indices)
        here.of |= {i.idx: i.root_idx for i in new}
        if hinders(here):
            break
        stack += _onward(dep, new) if new else []
    return list(found.values()), tied


def _onward(dep: Any, indices: list[Any]) -> Iterable[tuple[Any, list[Any]]]:
    for after in dep.target.dependencies:
        if after.is_triggered_by(dep.handler):
            moved = indices
            for mapping in filter(None, after.index_mapping):
                # Of a split that is taken apart more than once the graph does not know where each part begins.
                known = len(getattr(mapping, "offset", (0, 0))) == 2
                moved = mapping(moved) if known else [Index(i.idx, None) for i in moved]
            if moved:
                yield after, moved


def hinders(here: Reached) -> str | None:
    """Why the channels of what was reached cannot go, if so."""
    from torch import nn

    if here.dep.target.gets_out and not (here.side == "inputs" and _reads(here.layer)):
        return "what it makes is the network's output"
    if isinstance(here.layer, nn.Parameter):
        return "its channels meet a parameter outside of layers"
    if isinstance(here.layer, nn.LayerNorm | nn.Embedding | nn.MultiheadAttention | nn.LSTM):
        return f"its channels meet a {type(here.layer).__name__}"
    if has_channels(here.layer) and (None in here.of.values() or max(here.of) >= channels_of(here.layer, here.side)):
        return "between it and the next layer channels become something else"
    return None


def reach_after_shuffles(graph: Any, layer: Any) -> tuple[list[Reached], bool]:
    """All that hangs on the outputs of a layer, counted in channels after a pixel shuffle and not before it."""
    found, tied = reach(graph, layer, "outputs")
    if not tied or any(map(hinders, found)) or not any(_shuffles(here.dep.target) for here in found):
        return found, tied
    fewest = min((here for here in found if has_channels(here.layer)), key=lambda here: len(here.of))
    return reach(graph, fewest.layer, fewest.side)

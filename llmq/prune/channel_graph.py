"""torch-pruning's dependency graph (Fang et al. 2023), taught what it takes for an elementwise operation."""

from collections.abc import Callable, Sequence
from typing import Any

from llmq.models.shapes import FROZEN_NORM, channels_of, has_channels, kind_of, narrow


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
    return graph


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


def _teach_shuffle(node: Any, each: int) -> None:
    """A pixel shuffle makes one channel of `each` neighbouring ones."""

    def gather(indices: Sequence[Any]) -> list[Any]:
        return list({i.idx // each: i._replace(idx=i.idx // each) for i in reversed(indices)}.values())[::-1]

    def spread(indices: Sequence[Any]) -> list[Any]:
        return [i._replace(idx=i.idx * each + place) for i in indices for place in range(each)]

    for before in node.inputs:
        _map(before, node, gather)
        _map(node, before, spread)


def _map(source: Any, target: Any, mapping: Callable[[Sequence[Any]], list[Any]]) -> None:
    for dependency in source.dependencies:
        if dependency.target is target:
            dependency.index_mapping[0] = mapping


def after_shuffles(found: Any, graph: Any) -> Any:
    """A group of the graph, counted in the channels that a pixel shuffle makes and not in those that go into it."""
    if not any(_shuffles(item.dep.target) for item in found):
        return found
    deps = {len(item.idxs): item.dep for item in found if has_channels(item.dep.target.module)}
    fewest = min(deps)
    return graph.get_pruning_group(deps[fewest].target.module, deps[fewest].handler, list(range(fewest)))


def _shuffles(node: Any) -> bool:
    return str(getattr(node.module, "_grad_fn", "")) == "PixelShuffleBackward0"

"""The layers of an image network as matrices, for a step that changes weights and no shape."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmq.artifact import Artifact


class Matrices:
    """Convolutions and linear layers as matrices `[outputs, places of the kernel * inputs]`, neighbours being inputs.

    No layer is set apart as the head: the first and the last are like the others.
    """

    head = None

    def __init__(self, network: Any):
        self.network = network

    @classmethod
    def of(cls, artifact: Artifact) -> "Matrices":
        """Those of an artifact's weights."""
        from llmq.models.state import open_network

        model: Any = artifact.model
        return cls(open_network(model.network(), artifact.weights).eval())

    @cached_property
    def _layers(self) -> dict[str, Any]:
        from torch import nn

        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        return {name: layer for name, layer in self.network.named_modules() if isinstance(layer, kinds)}

    @property
    def inputs(self) -> dict[str, int]:
        """How many inputs of each layer are neighbours; of a grouped convolution those of one group."""
        sizes = ((name, layer, layer.weight.shape) for name, layer in self._layers.items())
        return {
            name: shape[0] // layer.groups if getattr(layer, "transposed", False) else shape[1]
            for name, layer, shape in sizes
        }

    def check_layers(self) -> None:
        """Every kind of matrix that an image network has is known here."""

    def share(self, layers: Iterable[str]) -> float:
        """How much of all weights these layers hold."""
        changed = sum(self._layers[name].weight.numel() for name in layers)
        return float(changed / sum(p.numel() for p in self.network.parameters()))

    def rewrite(self, folder: Path, method: Any, windows: Sequence[Any] = (), sequential: bool = True) -> list[str]:
        """Write the network to `folder`, each layer's matrix being what `method` (`blockwise.Method`) makes of it."""
        import torch

        from llmq.models.state import save_network

        with torch.no_grad():
            for name, layer in self._layers.items():
                if method.wants(name):
                    self._change(name, layer, method)
        save_network(self.network, folder)
        return []

    def _change(self, name: str, layer: Any, method: Any) -> None:
        import torch
        from torch.nn.utils import parametrize

        # A transposed convolution holds its inputs first, all others second.
        dimension = 0 if getattr(layer, "transposed", False) else 1
        turned = layer.weight.movedim(dimension, -1)
        changed: Mapping[str, Any] = method.change({name: turned.flatten(1)}, None)[name]
        weight = changed["weight"].view(turned.shape).movedim(-1, dimension).contiguous()
        if parametrize.is_parametrized(layer, "weight"):
            _set_normed(layer, weight)
        else:
            layer.weight = torch.nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


def _set_normed(layer: Any, weight: Any) -> None:
    """A weight as length and direction. What is all zero has no direction: it keeps its own, at length 0."""
    import torch

    normed = layer.parametrizations.weight
    before = normed.original1.clone()
    layer.weight = weight
    normed.original1.copy_(torch.where(normed.original0 == 0, before, normed.original1))

"""The layers of an image network as matrices, for a step that changes weights and no shape."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.files import LAYERS, write_json
from llmq.types import JsonObject
from llmq.vision.state import save_network

if TYPE_CHECKING:
    from torch.nn import Module

    from llmq.layers import LayerChange


class Matrices:
    """Convolutions and linear layers as matrices `(outputs, places of the kernel * inputs)`; inputs are neighbours.

    No layer is set apart as the head: the first and the last layer are like the others.
    """

    head = None

    def __init__(self, network: "Module"):
        self.network = network

    @cached_property
    def _layers(self) -> JsonObject:
        from torch import nn

        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        return {name: layer for name, layer in self.network.named_modules() if isinstance(layer, kinds)}

    @property
    def inputs(self) -> dict[str, int]:
        """The number of neighbouring inputs of each layer; for a grouped convolution, the inputs of one group."""
        return {
            name: len(layer.weight) // layer.groups if getattr(layer, "transposed", False) else layer.weight.shape[1]
            for name, layer in self._layers.items()
        }

    def check_layers(self) -> None:
        """Raise nothing: every convolution and linear layer can be changed."""

    def share(self, layers: Iterable[str]) -> float:
        """The share of all weights that these layers hold."""
        changed = sum(self._layers[name].weight.numel() for name in layers)
        return float(changed / sum(p.numel() for p in self.network.parameters()))

    def rewrite(self, folder: Path, change: "LayerChange[Any]") -> None:
        """Change each layer by itself, in place, and write the network to `folder`."""
        import torch

        with torch.no_grad():
            facts = {n: self._change(n, layer, change) for n, layer in self._layers.items() if change.wants(n)}
        save_network(self.network, folder)
        write_json(folder / LAYERS, facts)

    def _change(self, name: str, layer: Any, change: "LayerChange[Any]") -> dict[str, object]:
        """Change a layer in place. Returns the facts about it."""
        import torch
        from torch.nn.utils import parametrize

        dimension = 0 if getattr(layer, "transposed", False) else 1  # a transposed convolution holds its inputs first
        turned = layer.weight.movedim(dimension, -1)  # (outputs, *kernel, inputs)
        flat = turned.flatten(1)
        changed = change.change({name: flat}, None)[name]
        facts = change.facts(name, flat, changed["weight"], None)
        weight = changed["weight"].view(turned.shape).movedim(-1, dimension).contiguous()  # in the order of the layer
        if not parametrize.is_parametrized(layer, "weight"):
            layer.weight = torch.nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            return facts
        # Held as length and direction. A weight of zeros has no direction: the old one stays, at length 0.
        normed = layer.parametrizations.weight
        before = normed.original1.clone()
        layer.weight = weight
        normed.original1.copy_(torch.where(normed.original0 == 0, before, normed.original1))
        return facts

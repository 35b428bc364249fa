"""Names of layers in an exported graph, where folding a normalization into a convolution has lost them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

MODULE = "__module."
"""What the names of operations that come from a module's layers begin with."""
TOLERANCE = 1e-3


def restore_names(graph: Any, module: Any) -> None:
    """Give convolutions without a name that of the layer whose weights they hold, each output scaled or not.

    No name is given twice, though weights that a normalization has scaled to zero fit any layer.
    """
    operations = graph.get_ordered_ops()
    taken = {layer for _, layer in operations_of(operation.get_friendly_name() for operation in operations)}
    others = ((name, layer) for name, layer in module.named_modules() if name not in taken)
    layers = {name: rows for name, layer in others if (rows := _rows_of(layer)) is not None}
    for operation in operations:
        if "Convolution" in operation.get_type_name() and not operation.get_friendly_name().startswith(MODULE):
            constant = operation.input_value(1).get_node()
            if constant.get_type_name() == "Constant":
                rows = _rows(torch.from_numpy(constant.data.astype(np.float32)), operation.get_type_name())
                found = next((name for name, its in layers.items() if are_proportional(rows, its)), None)
                if found is not None:
                    del layers[found]
                    operation.set_friendly_name(f"{MODULE}{found}/{operation.get_type_name()}")


def _rows_of(layer: Any) -> Any:
    from torch.nn.modules.conv import _ConvNd

    if not isinstance(layer, _ConvNd):
        return None
    return _rows(layer.weight.detach(), "ConvolutionBackpropData" if layer.transposed else "Convolution")


def _rows(weight: Any, kind: str) -> Any:
    """A weight as a row of numbers for each output."""
    if kind == "ConvolutionBackpropData":  # inputs come first
        weight = weight.transpose(0, 1)
    if kind == "GroupConvolution" and weight.dim() == 5:  # groups come first in a graph
        weight = weight.flatten(0, 1)
    return weight.flatten(1)


def are_proportional(rows: Any, others: Any) -> bool:
    """Whether each row is a multiple of its partner."""
    if rows.shape != others.shape:
        return False
    factors = (rows * others).sum(1) / others.square().sum(1).clamp_min(1e-30)
    return bool((rows - factors[:, None] * others).norm() <= TOLERANCE * rows.norm())


def operations_of(names: Any) -> Iterator[tuple[str, str]]:
    """Of names of operations, those that come from layers, each with its layer."""
    return ((name, name.removeprefix(MODULE).partition("/")[0]) for name in names if name.startswith(MODULE))

"""The layers of a network in the exported graph: their names, their weights, and the layers that no input reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from llmq.matrix.layer_error import layer_facts
from llmq.vision.exported import users

if TYPE_CHECKING:
    from openvino import Model, Node

MODULE = "__module."
"""The prefix of the names of operations that come from a module's layers."""
TOLERANCE = 1e-3  # as a share of the norm
WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


def restore_names(graph: Model, module: Module, rounded: Mapping[str, Tensor] = {}) -> None:
    """Name convolutions after the layer whose weights they hold, where folding a normalization has lost the name.

    Folding scales each output by a number of its own. No name is given twice, although weights that folding has scaled
    to zero fit any layer. `rounded` holds the weights of layers that the module rounds as it runs.
    """
    operations = graph.get_ordered_ops()
    taken = {layer for _, layer in operations_of(operation.get_friendly_name() for operation in operations)}
    layers = {
        name: _rows(
            rounded.get(name, layer.weight.detach()), "ConvolutionBackpropData" if layer.transposed else "Convolution"
        )
        for name, layer in module.named_modules()
        if name not in taken and isinstance(layer, torch.nn.modules.conv._ConvNd)
    }
    for operation in operations:
        kind, named = operation.get_type_name(), operation.get_friendly_name().startswith(MODULE)
        decoded = _decoded(operation.input_value(1).get_node()) if "Convolution" in kind and not named else None
        if decoded is not None:
            rows = _rows(torch.from_numpy(decoded[0]), kind)  # (outputs, numbers)
            layer = next((name for name, weight in layers.items() if are_proportional(rows, weight)), None)
            if layer is not None:
                del layers[layer]
                operation.set_friendly_name(f"{MODULE}{layer}/{kind}")


def facts_of(before: Model, made: Model) -> dict[str, dict[str, object]]:
    """The facts about each layer of a graph beside the same layer of the graph that it was made of.

    Layers whose weights are computed in the graph are left out.
    """
    known = _weights(before)
    facts = {}
    for name, (weight, bits) in _weights(made).items():
        if name in known and known[name][0].shape == weight.shape:
            facts[name] = layer_facts(known[name][0], weight, bits)
    return facts


def _weights(graph: Model) -> dict[str, tuple[Tensor, int]]:
    """The weight `(outputs, numbers)` of each layer, and the bits of a stored number."""
    found = {}
    for operation in graph.get_ordered_ops():
        kind, name = operation.get_type_name(), operation.get_friendly_name()
        decoded = _decoded(operation.input_value(1).get_node()) if kind in WEIGHTED else None
        if decoded is not None and decoded[0].ndim > 1:
            layer = next((layer for _, layer in operations_of([name])), name)
            found[layer] = _rows(torch.from_numpy(decoded[0]), kind), decoded[1]
    return found


def _decoded(node: Node) -> tuple[np.ndarray, int] | None:
    """The numbers that a constant stands for, once its scales and zero points are applied, and the bits of one."""
    kind = node.get_type_name()
    if kind == "Constant":
        # `data` of 4 bits are bytes that hold two numbers each.
        return node.get_data(dtype=np.float32).copy(), node.get_output_element_type(0).bitwidth
    if kind == "Convert":
        return _decoded(node.input_value(0).get_node())
    if kind == "Reshape":  # a depthwise weight of 4 bits gets its groups back
        inner, shape = _decoded(node.input_value(0).get_node()), node.get_output_partial_shape(0)
        return (inner[0].reshape(shape.to_shape()), inner[1]) if inner and shape.is_static else None
    if kind not in ("Multiply", "Subtract"):
        return None
    first, second = (_decoded(value.get_node()) for value in (node.input_value(0), node.input_value(1)))
    if first is None or second is None:
        return None
    return (first[0] * second[0] if kind == "Multiply" else first[0] - second[0]), first[1]


def _rows(weight: Tensor, kind: str) -> Tensor:
    """A weight as `(outputs, numbers)`."""
    if kind == "ConvolutionBackpropData":  # (inputs, outputs, …)
        weight = weight.transpose(0, 1)
    if kind == "GroupConvolution" and weight.dim() == 5:  # (groups, outputs of one, …)
        weight = weight.flatten(0, 1)
    return weight.flatten(1)


def are_proportional(rows: Tensor, others: Tensor) -> bool:
    """True if each row is a multiple of its partner; both tensors are `(rows, numbers)`."""
    if rows.shape != others.shape:
        return False
    factors = (rows * others).sum(1) / others.square().sum(1).clamp_min(1e-30)  # least squares, one a row
    return bool((rows - factors[:, None] * others).norm() <= TOLERANCE * rows.norm())


def operations_of(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names of operations that come from layers, each with its layer."""
    return ((name, name.removeprefix(MODULE).partition("/")[0]) for name in names if name.startswith(MODULE))


def unfed_layers(graph: Model) -> list[str]:
    """The layers that compute the same for every input of one shape, such as those of learned queries or positions.

    OpenVINO computes them once, while compiling the graph for that shape. With int8 weights version 2026.4 fails there:
    `Check 'm_element_type.is_static()' failed`. These layers must stay in float, which costs no time.
    """
    fed: set[str] = set()  # operations that the numbers of the input reach
    waiting = list(graph.get_parameters())
    while waiting:
        operation = waiting.pop()
        # The shape of the input is known before any of its numbers.
        if operation.get_name() not in fed and operation.get_type_name() != "ShapeOf":
            fed.add(operation.get_name())
            waiting += users(operation)
    layers = (o for o in graph.get_ordered_ops() if o.get_type_name() in WEIGHTED)
    return [layer.get_friendly_name() for layer in layers if layer.get_name() not in fed]

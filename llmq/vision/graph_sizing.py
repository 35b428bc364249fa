"""The files of an exported graph, foretold: the network is exported with random weights, and its nodes are counted."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from llmq.vision.graph_layers import WEIGHTED

if TYPE_CHECKING:
    from openvino import Node, Output
    from torch.nn import Module

    from llmq.vision.family import ImageModel

NODE = 395
"""Bytes that describe one node in a graph's XML, 390 to 406 in five networks of all kinds."""
TRACED_NODE = 420
"""The same of a network that was trained with its rounding, which keeps torch's longer names."""
WEIGHT_NODES, RANGE_NODES, RANGE = 3, 5, 8
"""Nodes that turn int8 weights into floats, and those that round an activation, with the bytes of a range."""
SHAPE_NODES = 2
"""Nodes that give a grouped weight of 4 bits its groups back, which torch does not know: training begins there."""
IN_GATES = ("Add", "Relu", "PRelu", "Swish", "HSwish", "Sigmoid", "HSigmoid")
"""Operations between the mean of an image and the factor that a squeeze-and-excitation makes of it, besides layers."""
PASSING = ("MaxPool", "Reshape", "Transpose", "Pad", "Squeeze", "Unsqueeze", "Split", "Convert")
"""Operations that take rounded numbers as they are."""


def graph_bytes(
    model: ImageModel, network: Module, bits: int, activations: bool, node_text: float = 0.0
) -> tuple[int, int]:
    """The bytes of `model.xml` and `model.bin`, and of the constants alone, with weights of `bits`.

    With `activations`, ranges of these are there as well; `node_text` bytes describe a node, if known. Raises
    `UserError` without OpenVINO, `RuntimeError` for a network that is not exported.
    """
    from llmq.openvino_runtime import openvino, quietly
    from llmq.vision.exported import ExportedModule

    library = openvino()
    if isinstance(network, ExportedModule):
        graph = network.graph
    else:
        with quietly():
            graph = library.convert_model(model.deployed(_varied(network)), example_input=model.example(1))
    nodes, constants = _stored(graph.get_ordered_ops(), bits, activations)
    return int((node_text or NODE) * nodes) + constants, constants


def _stored(operations: list[Node], bits: int, activations: bool) -> tuple[int, int]:
    """The nodes of a graph that stores weights in `bits`, and the bytes of the constants."""
    constants = [node for node in operations if node.get_type_name() == "Constant"]
    held, count = sum(int(node.data.nbytes) for node in constants), len(operations)
    if bits == 32:
        return count, held
    if bits == 16:
        return count + len(constants), held // 2
    gates = _gates(operations) if activations else set()
    layers = [node for node in operations if node.get_name() not in gates and _weight(node) is not None]
    heavy = sum(int(weight.data.nbytes) for weight in map(_weight, layers) if weight is not None)
    outputs, packed = sum(map(_outputs, layers)), heavy * bits // 32 + (held - heavy)
    if not activations:  # scales in float16, which one more node turns into float32
        return count + (WEIGHT_NODES + 1) * len(layers), packed + 2 * outputs
    rounded = _rounded([node for node in operations if node.get_name() not in gates])
    shaped = sum(node.get_type_name() == "GroupConvolution" for node in layers) if bits < 8 else 0
    nodes = count + WEIGHT_NODES * len(layers) + RANGE_NODES * len(rounded) + SHAPE_NODES * shaped
    return nodes, packed + 4 * outputs + RANGE * sum(rounded)


def _gates(operations: list[Node]) -> set[str]:
    """The layers of squeeze-and-excitation, which NNCF leaves in float.

    They make a factor for each channel of an image out of the channel's mean.
    """
    found: set[str] = set()
    for node in operations:
        if node.get_type_name() == "Multiply":
            gate, image = (node.input_value(i) for i in (0, 1))
            found |= _gate(gate, image) or _gate(image, gate)
    return found


def _gate(gate: Output, image: Output) -> set[str]:
    """The layers from the mean of an image to a factor of it; none where the value is no such factor."""
    layers: set[str] = set()
    node = gate.get_node()
    while node.get_type_name() in (*WEIGHTED, *IN_GATES):
        if node.get_type_name() in WEIGHTED:
            layers.add(node.get_name())
        gate = node.input_value(0)
        node = gate.get_node()
    means = node.get_type_name() == "ReduceMean" and node.input_value(0) == image
    return layers if means else set()


def _varied(network: Module) -> Module:
    """A copy whose vectors are random: a new batch norm shifts by 0, and exporting would leave that out."""
    import torch

    varied = copy.deepcopy(network).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in (*varied.parameters(), *varied.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return varied


def _weight(node: Node) -> Node | None:
    """The constant that holds the weight of a layer."""
    weight = node.input_value(1).get_node() if node.get_type_name() in WEIGHTED else None
    return weight if weight is not None and weight.get_type_name() == "Constant" else None


def _outputs(node: Node) -> int:
    """The outputs of a layer, each of which has a scale of its own."""
    kind, shape = node.get_type_name(), list(node.input_value(1).get_node().shape)
    if kind == "ConvolutionBackpropData":
        return int(shape[1])
    return int(shape[0] * shape[1] if kind == "GroupConvolution" else shape[0])


def _rounded(operations: list[Node]) -> list[int]:
    """The ranges of each activation that NNCF rounds: what layers, means, and sums and products of two images take.

    A layer of one image a channel (depthwise) rounds each channel in a range of its own.
    """
    taken: dict[tuple[str, int], int] = {}
    for node in operations:
        kind = node.get_type_name()
        if kind in (*WEIGHTED, "AvgPool", "ReduceMean"):
            at = _source(node.input_value(0))
            taken[at] = max(taken.get(at, 1), _channels(node))
        elif kind in ("Add", "Multiply") and node.get_output_partial_shape(0).rank.get_length() == 4:
            values = [node.input_value(0), node.input_value(1)]
            if all(value.get_node().get_type_name() != "Constant" for value in values):
                for at in map(_source, values):
                    taken.setdefault(at, 1)
    return list(taken.values())


def _channels(node: Node) -> int:
    """The channels of a layer that has one image for each; 1 for any other layer."""
    shape = list(node.input_value(1).get_shape()) if node.get_type_name() == "GroupConvolution" else [1, 0]
    return int(shape[0]) if shape[1] == 1 else 1


def _source(value: Output) -> tuple[str, int]:
    """The operation that a tensor comes from, and which of its outputs the tensor is."""
    while value.get_node().get_type_name() in PASSING:
        value = value.get_node().input_value(0)
    return value.get_node().get_name(), value.get_index()

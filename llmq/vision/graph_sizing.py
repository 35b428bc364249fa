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
WEIGHT_NODES, RANGE_NODES, RANGE = 3, 5, 6
"""Nodes that turn int8 weights into floats, and those that round an activation, with the bytes of its range."""
PASSING = ("MaxPool", "Reshape", "Transpose", "Pad", "Squeeze", "Unsqueeze", "Split", "Convert")
"""Operations that take rounded numbers as they are."""


def graph_bytes(model: ImageModel, network: Module, bits: int, activations: bool) -> int:
    """The bytes of `model.xml` and `model.bin` with weights of `bits`; with `activations`, ranges of these as well.

    Raises `UserError` without OpenVINO, `RuntimeError` for a network that is not exported.
    """
    from llmq.openvino_runtime import openvino, quietly

    library = openvino()
    with quietly():
        graph = library.convert_model(model.deployed(_varied(network)), example_input=model.example(1))
    operations = graph.get_ordered_ops()
    constants = [node for node in operations if node.get_type_name() == "Constant"]
    weights = [node for node in map(_weight, operations) if node is not None]
    held, heavy = (sum(int(node.data.nbytes) for node in nodes) for nodes in (constants, weights))
    count = len(operations)
    if bits == 32:
        return NODE * count + held
    if bits == 16:
        return NODE * (count + len(constants)) + held // 2
    outputs = sum(_outputs(node) for node in operations if _weight(node) is not None)
    packed = heavy // 4 + (held - heavy)
    if not activations:  # scales in float16, which one more node turns into float32
        return NODE * (count + (WEIGHT_NODES + 1) * len(weights)) + packed + 2 * outputs
    rounded = _rounded(operations)
    nodes = count + WEIGHT_NODES * len(weights) + RANGE_NODES * rounded
    return NODE * nodes + packed + 4 * outputs + RANGE * rounded


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


def _rounded(operations: list[Node]) -> int:
    """The number of activations that NNCF rounds: what layers, means and sums of two images take."""
    taken: set[tuple[str, int]] = set()
    for node in operations:
        kind = node.get_type_name()
        if kind in (*WEIGHTED, "AvgPool", "ReduceMean"):
            taken.add(_source(node.input_value(0)))
        elif kind == "Add" and node.get_output_partial_shape(0).rank.get_length() == 4:
            values = [node.input_value(0), node.input_value(1)]
            if all(value.get_node().get_type_name() != "Constant" for value in values):
                taken.update(map(_source, values))
    return len(taken)


def _source(value: Output) -> tuple[str, int]:
    """The operation that a tensor comes from, and which of its outputs the tensor is."""
    while value.get_node().get_type_name() in PASSING:
        value = value.get_node().input_value(0)
    return value.get_node().get_name(), value.get_index()

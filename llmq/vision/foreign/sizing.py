"""An exported graph foretold from its file, which tells sizes, shapes and operations."""

from __future__ import annotations

from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmq.openvino_runtime import GRAPH
from llmq.sketch import Part
from llmq.vision.exported import ExportedModule, constants
from llmq.vision.graph_layers import WEIGHTED
from llmq.vision.sizing import ImageSketch, Pass

if TYPE_CHECKING:
    from openvino import Model, Node, Output

    from llmq.vision.foreign.family import Foreign


def sketch_of(model: Foreign) -> ImageSketch:
    """The sketch of a graph whose settings are resolved. Raises `UserError` for a file that is no graph."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        model.write_graph(folder)
        network = ExportedModule(folder)
        files = sum(file.stat().st_size for file in folder.iterdir())
        text = (folder / GRAPH).stat().st_size
    found = list(constants(network.graph))
    parts = tuple(
        Part.plain(f"{i}", tuple(node.get_output_shape(0)), "float32", "other" if is_weight else "buffer")
        for i, (node, is_weight) in enumerate(found)
    )
    sketch = ImageSketch(
        parts,
        "float32",
        runtime="openvino",
        model=model,
        network=network,
        counted=_counted(model, network.graph),
        constants=sum(int(node.data.nbytes) for node, _ in found),
        tried_in="openvino",
        node_text=text / len(network.graph.get_ordered_ops()),
    )
    return sketch.with_files(files)


def _counted(model: Foreign, graph: Model) -> Pass:
    """One pass of one image through a graph; what has no shape before the pass is left out."""
    shape = list(model.example(1).shape)
    fixed = graph.clone()
    fixed.reshape(shape)
    operations = [node for node in fixed.get_ordered_ops() if not node.get_output_partial_shape(0).is_dynamic]
    layers = [node for node in operations if node.get_type_name() in WEIGHTED]
    live = max((_bytes_of_pass(node) for node in operations), default=0)
    return Pass(sum(map(_multiplied, layers)), live, 0, len(layers), prod(shape[2:]))


def _multiplied(layer: Node) -> float:
    """The operations of a layer: two for each product."""
    kind, weight = layer.get_type_name(), list(layer.input_value(1).get_shape())
    if kind == "MatMul":
        of_one = int(list(layer.input_value(0).get_shape())[-2 if layer.get_attributes()["transpose_a"] else -1])
    elif kind.endswith("BackpropData"):  # each input goes into as many outputs
        return float(2 * prod(layer.input_value(0).get_shape()) * prod(weight[2 if kind.startswith("Group") else 1 :]))
    else:
        of_one = prod(weight[2 if kind == "GroupConvolution" else 1 :])
    return float(2 * prod(layer.get_output_shape(0)) * of_one)


def _bytes_of_pass(node: Node) -> int:
    """The bytes of what an operation takes and makes, constants left out."""
    if node.get_type_name() == "Constant":
        return 0
    taken = [value for value in node.input_values() if value.get_node().get_type_name() != "Constant"]
    return sum(map(_bytes, (*taken, *node.outputs())))


def _bytes(value: Output) -> int:
    shape = value.get_partial_shape()
    return 0 if shape.is_dynamic else 4 * prod(value.get_shape())

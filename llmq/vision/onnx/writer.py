"""A graph of OpenVINO written as ONNX: its constants, packed weights as they are stored, and its outputs by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmq.errors import LlmqError
from llmq.vision.exported import users
from llmq.vision.onnx.library import OPSET, onnx

if TYPE_CHECKING:
    from numpy import ndarray
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
    from openvino import Model, Node, Output

Attributes = dict[str, Any]
"""What OpenVINO says of an operation beside its inputs."""
ELEMENTS = {"f32": "FLOAT", "f16": "FLOAT16", "f64": "DOUBLE", "i64": "INT64", "i32": "INT32", "boolean": "BOOL"}
ELEMENTS |= {"i8": "INT8", "u8": "UINT8"}
"""OpenVINO's names of dtypes, and those of ONNX."""


@dataclass(frozen=True)
class Weight:
    """Numbers as they are stored; integers stand for `(numbers - zero) * scale`. All three have one rank."""

    numbers: ndarray
    scale: ndarray | None = None
    zero: ndarray | None = None

    def transposed(self, order: Sequence[int]) -> Weight:
        """The weight with its axes in another order."""
        return Weight(*(None if part is None else part.transpose(order) for part in self._parts()))  # type: ignore[arg-type]

    def merged(self) -> Weight:
        """The weight with its first two axes, groups and outputs of a group, as one."""
        first = self.numbers.shape[:2]
        parts = (
            None if part is None else np.broadcast_to(part, (*first, *part.shape[2:])).reshape(-1, *part.shape[2:])
            for part in self._parts()
        )
        return Weight(*parts)  # type: ignore[arg-type]

    def _parts(self) -> tuple[ndarray, ndarray | None, ndarray | None]:
        return self.numbers, self.scale, self.zero


class Writer:
    """The nodes and constants of an ONNX graph that grows in the order of its operations."""

    def __init__(self) -> None:
        self.helper = onnx().helper
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.named: dict[tuple[str, int], str] = {}
        """The names of what operations give: the operation and the number of its output."""

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node. Returns the names of its outputs."""
        names = [f"{kind}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, names[0], **attributes))
        return names

    def one(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output. Returns the name of the output."""
        return self.add(kind, *inputs, **attributes)[0]

    def constant(self, array: ndarray | list[int]) -> str:
        """Add a constant, though it equals another (ONNX Runtime 1.32 fails on shared ones); a list is int64."""
        held = np.asarray(array)
        name = f"constant_{len(self.initializers)}"
        whole = np.ascontiguousarray(held).reshape(held.shape)  # which makes one axis of none
        self.initializers.append(onnx().numpy_helper.from_array(whole, name))
        return name

    def of(self, output: Output) -> str:
        """The name of an operation's output; a constant is written when it is first asked for."""
        node, key = output.get_node(), (output.get_node().get_name(), output.get_index())
        if key not in self.named:
            weight = stored(output)
            if weight is None:
                raise LlmqError(f"{node.get_friendly_name()} is used before it is written")
            self.named[key] = self.weight(weight)
        return self.named[key]

    def weight(self, weight: Weight) -> str:
        """Write a weight as it is stored. Returns the name of its float values."""
        numbers = self.constant(weight.numbers)
        if weight.scale is None:
            return self.one("Cast", numbers, to=self.element("f32")) if weight.numbers.dtype == np.float16 else numbers
        shape = np.broadcast_shapes(weight.scale.shape, weight.zero.shape if weight.zero is not None else ())
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if len(axes) > 1:
            raise LlmqError(f"a weight with a scale for each of {list(shape)} has no place in ONNX")
        zero = np.zeros(1) if weight.zero is None else weight.zero
        sizes = tuple(shape[axis] for axis in axes)
        parts = [np.broadcast_to(part, shape).reshape(sizes) for part in (weight.scale.astype(np.float32), zero)]
        grid = [self.constant(parts[0]), self.constant(parts[1].astype(weight.numbers.dtype))]
        return self.one("DequantizeLinear", numbers, *grid, **({"axis": axes[0]} if axes else {}))

    def int64(self, output: Output) -> str:
        """The name of an output that is a list of integers, as int64."""
        array = constant_of(output)
        if array is not None:
            return self.constant(array.astype(np.int64).reshape(-1))
        flat = self.of(output)
        if output.get_element_type().get_type_name() != "i64":
            flat = self.one("Cast", flat, to=self.element("i64"))
        return flat if output.get_partial_shape().rank.get_length() else self.one("Unsqueeze", flat, self.constant([0]))

    def element(self, kind: str) -> int:
        """The number of a dtype in ONNX, by its name in OpenVINO."""
        if kind not in ELEMENTS:
            raise LlmqError(f"numbers of dtype {kind} have no place in the ONNX graph")
        return int(getattr(onnx().TensorProto, ELEMENTS[kind]))

    def model(self, graph: Model, names: Sequence[str]) -> ModelProto:
        """The finished model with one input, `input`, and outputs of these names."""
        results = graph.get_results()
        for result, name in zip(results, names, strict=True):
            self.nodes.append(self.helper.make_node("Identity", [self.of(result.input_value(0))], [name], name))
        inputs = [self._told("input", graph.input(0))]
        outputs = [self._told(name, r.output(0)) for name, r in zip(names, results, strict=True)]
        made = self.helper.make_graph(self.nodes, "graph", inputs, outputs, self.initializers)
        opsets = [self.helper.make_opsetid("", OPSET)]
        return self.helper.make_model(made, opset_imports=opsets, ir_version=8, producer_name="llmq")

    def _told(self, name: str, output: Output) -> ValueInfoProto:
        """The type and shape of an input or output; sizes that are free have names."""
        shape = [
            f"{name}_{'nchw'[i : i + 1] or i}" if size.is_dynamic else size.get_length()
            for i, size in enumerate(output.get_partial_shape())
        ]
        kind = self.element(output.get_element_type().get_type_name())
        return self.helper.make_tensor_value_info(name, kind, shape)


def constant_of(output: Output) -> ndarray | None:
    """The numbers of an output that is a constant, or None."""
    weight = stored(output)
    return weight.numbers if weight is not None and weight.scale is None else None


def needed(output: Output) -> Any:
    """The numbers of an output. Raises `LlmqError` if it is no constant."""
    array = constant_of(output)
    if array is None:
        raise LlmqError(f"{output.get_node().get_friendly_name()} depends on the input, where ONNX needs a constant")
    return array


def stored(output: Output) -> Weight | None:
    """The weight behind an output: a constant, a float16 constant made float32, or scaled integers; None for others."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return Weight(node.data)
    if kind == "Convert":
        inner = stored(node.input_value(0))
        to = node.get_element_type().get_type_name()
        if inner is not None and inner.scale is None and inner.numbers.dtype.kind != "f":
            return None if to in ("f32", "f16") else Weight(inner.numbers.astype(node.get_element_type().to_dtype()))
        return inner if to == "f32" else None
    if kind == "Multiply":
        numbers, zero = _integers(node.input_value(0))
        scale = constant_of(node.input_value(1)) if numbers is not None else None
        if numbers is not None and scale is not None:
            return Weight(*(None if p is None else _ranked(p, numbers.ndim) for p in (numbers, scale, zero)))  # type: ignore[arg-type]
    return None


def _integers(output: Output) -> tuple[ndarray | None, ndarray | None]:
    """The stored integers behind an output, and their zero point if there is one."""
    node = output.get_node()
    if node.get_type_name() == "Subtract":
        zero = node.input_value(1).get_node()
        zero = zero.input_value(0).get_node() if zero.get_type_name() == "Convert" else zero
        if zero.get_type_name() == "Constant":
            return _integers(node.input_value(0))[0], zero.data
    if node.get_type_name() == "Convert":
        constant = node.input_value(0).get_node()
        if constant.get_type_name() == "Constant" and constant.get_element_type().get_type_name() in ("i8", "u8"):
            return constant.data, None
    return None, None


def _ranked(array: ndarray, rank: int) -> ndarray:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def is_coded(node: Node) -> bool:
    """True for an operation that only turns a constant into floats: it is written with what reads it."""
    kind = node.get_type_name()
    if kind in ("Constant", "Convert", "Subtract", "Multiply") and stored(node.output(0)) is not None:
        return True
    if kind in ("Convert", "Subtract") and _integers(node.output(0))[0] is not None:
        return True
    # A zero point of its own dtype.
    readers = [user for user in users(node) if user.get_type_name() == "Subtract"] if kind == "Convert" else []
    return any(_integers(reader.output(0))[1] is not None for reader in readers)


def rank_of(output: Output) -> int:
    """The number of axes of an output."""
    return int(output.get_partial_shape().rank.get_length())


def ints(values: Iterable[Any]) -> list[int]:
    """The values as plain integers."""
    return [int(value) for value in values]

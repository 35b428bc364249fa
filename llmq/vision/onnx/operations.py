"""Each operation of an OpenVINO graph as operations of ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmq.errors import LlmqError
from llmq.vision.onnx.layers import (
    attention,
    convolution,
    fake_quantize,
    group_normalized,
    matmul,
    normalized,
    pooled,
)
from llmq.vision.onnx.shapes import SHAPES
from llmq.vision.onnx.writer import Attributes, Writer, ints, is_coded, needed

if TYPE_CHECKING:
    from onnx import ModelProto
    from openvino import Model, Node

SAME = {
    **{name: name for name in ("Abs", "Add", "And", "Concat", "Cos", "Equal", "Erf", "Exp", "Greater", "Less")},
    **{name: name for name in ("Log", "Relu", "Sigmoid", "Sign", "Sin", "Sqrt", "Tanh", "GatherElements")},
    "BitwiseAnd": "And",
    "BitwiseNot": "Not",
    "BitwiseOr": "Or",
    "Divide": "Div",
    "FloorMod": "Mod",
    "GreaterEqual": "GreaterOrEqual",
    "HSwish": "HardSwish",
    "LessEqual": "LessOrEqual",
    "LogicalAnd": "And",
    "LogicalNot": "Not",
    "LogicalOr": "Or",
    "Maximum": "Max",
    "Minimum": "Min",
    "Multiply": "Mul",
    "Negative": "Neg",
    "PRelu": "PRelu",
    "Power": "Pow",
    "Select": "Where",
    "SoftPlus": "Softplus",
    "Subtract": "Sub",
}
"""Operations with the same inputs and no settings, or settings of the same names."""
KEPT = {"Concat": ("axis",), "GatherElements": ("axis",)}
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
Written = str | list[str]


def to_onnx(graph: Model) -> ModelProto:
    """The graph as ONNX. Raises `LlmqError` for an operation that has no place there."""
    writer = Writer()
    for node in graph.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_name()
        if kind == "Parameter":
            writer.named[name, 0] = "input"
        elif kind != "Result" and not is_coded(node) and (name, 0) not in writer.named:
            made = _written(writer, node)
            writer.named |= {(name, i): output for i, output in enumerate([made] if isinstance(made, str) else made)}
    outputs = len(graph.get_results())
    return writer.model(graph, ["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)])


def _written(writer: Writer, node: Node) -> Written:
    kind = node.get_type_name()
    # The letters of one setting are small in some operations and capital in others.
    attributes = {
        key: value.lower() if isinstance(value, str) else value for key, value in node.get_attributes().items()
    }
    if kind in SAME:
        kept = {key: attributes[key] for key in KEPT.get(kind, ())}
        return writer.one(SAME[kind], *map(writer.of, node.input_values()), **kept)
    if kind in REDUCTIONS:
        axes = ints(needed(node.input_value(1)).reshape(-1))
        return writer.one(kind, writer.of(node.input_value(0)), axes=axes, keepdims=int(attributes["keep_dims"]))
    if kind not in OPERATIONS:
        raise LlmqError(f"the operation {kind} has no place in ONNX yet ({node.get_friendly_name()})")
    return OPERATIONS[kind](writer, node, attributes)


def _gelu(w: Writer, node: Node, attributes: Attributes) -> Written:
    x = w.of(node.input_value(0))
    half, one, root = (w.constant(np.array(number, np.float32)) for number in (0.5, 1, math.sqrt(2)))
    if attributes.get("approximation_mode", "erf") == "erf":
        inner = w.one("Erf", w.one("Div", x, root))
    else:
        cube = w.one("Mul", w.one("Mul", w.one("Mul", x, x), x), w.constant(np.array(0.044715, np.float32)))
        factor = w.constant(np.array(math.sqrt(2 / math.pi), np.float32))
        inner = w.one("Tanh", w.one("Mul", w.one("Add", x, cube), factor))
    return w.one("Mul", w.one("Mul", x, w.one("Add", inner, one)), half)


def _clamp(w: Writer, node: Node, attributes: Attributes) -> Written:
    bounds = [w.constant(np.array(attributes[key], np.float32)) for key in ("min", "max")]
    return w.one("Clip", w.of(node.input_value(0)), *bounds)


def _swish(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, *beta = map(w.of, node.input_values())
    return w.one("Mul", x, w.one("Sigmoid", w.one("Mul", x, beta[0]) if beta else x))


def _mish(w: Writer, node: Node, attributes: Attributes) -> Written:
    x = w.of(node.input_value(0))
    return w.one("Mul", x, w.one("Tanh", w.one("Softplus", x)))


def _hard_sigmoid(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one("HardSigmoid", w.of(node.input_value(0)), alpha=1 / 6, beta=0.5)


def _softmax(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one(node.get_type_name(), w.of(node.input_value(0)), axis=int(attributes["axis"]))


def _elu(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one("Elu", w.of(node.input_value(0)), alpha=float(attributes["alpha"]))


def _sum(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one(
        "ReduceSum", w.of(node.input_value(0)), w.int64(node.input_value(1)), keepdims=int(attributes["keep_dims"])
    )


def _all_or_any(w: Writer, node: Node, attributes: Attributes) -> Written:
    """Truths over some axes, which ONNX reduces as numbers alone."""
    kind = {"ReduceLogicalAnd": "ReduceMin", "ReduceLogicalOr": "ReduceMax"}[node.get_type_name()]
    numbers = w.one("Cast", w.of(node.input_value(0)), to=w.element("i32"))
    axes = ints(needed(node.input_value(1)).reshape(-1))
    return w.one(
        "Cast", w.one(kind, numbers, axes=axes, keepdims=int(attributes["keep_dims"])), to=w.element("boolean")
    )


def _squared_difference(w: Writer, node: Node, attributes: Attributes) -> Written:
    less = w.one("Sub", *map(w.of, node.input_values()))
    return w.one("Mul", less, less)


def _modulo(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one("Mod", *map(w.of, node.input_values()), fmod=1)  # the sign of the first, as in C


def _sampled(w: Writer, node: Node, attributes: Attributes) -> Written:
    settings = {
        "align_corners": int(attributes["align_corners"]),
        "mode": attributes["mode"],
        "padding_mode": attributes["padding_mode"],
    }
    return w.one("GridSample", *map(w.of, node.input_values()), **settings)


OPERATIONS: dict[str, Callable[[Writer, Node, Attributes], Written]] = {
    **SHAPES,
    **dict.fromkeys(("Convolution", "GroupConvolution"), convolution),
    **dict.fromkeys(("ConvolutionBackpropData", "GroupConvolutionBackpropData"), convolution),
    **dict.fromkeys(("AvgPool", "MaxPool"), pooled),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("ReduceLogicalAnd", "ReduceLogicalOr"), _all_or_any),
    "Clamp": _clamp,
    "Elu": _elu,
    "FakeQuantize": fake_quantize,
    "Gelu": _gelu,
    "GridSample": _sampled,
    "GroupNormalization": group_normalized,
    "HSigmoid": _hard_sigmoid,
    "MVN": normalized,
    "MatMul": matmul,
    "Mish": _mish,
    "Mod": _modulo,
    "ReduceSum": _sum,
    "ScaledDotProductAttention": attention,
    "SquaredDifference": _squared_difference,
    "Swish": _swish,
}

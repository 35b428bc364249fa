"""The layers of an OpenVINO graph as operations of ONNX: products, attention, normalizations, pools, and ranges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from llmq.errors import LlmqError
from llmq.vision.exported import users
from llmq.vision.onnx.writer import Attributes, Writer, constant_of, ints, needed, rank_of, stored

if TYPE_CHECKING:
    from openvino import Node, Output

Written = str | list[str]


def convolution(w: Writer, node: Node, attributes: Attributes) -> Written:
    """A convolution, plain, grouped or transposed, with the bias that is added to it."""
    grouped, transposed = "Group" in node.get_type_name(), "BackpropData" in node.get_type_name()
    source = node.input_value(1)
    weight, group = stored(source), 1
    if grouped:
        group = int(source.get_partial_shape()[0].get_length())
    if weight is not None:
        weights = w.weight(weight.merged() if grouped else weight)
    elif grouped:  # (groups, outputs of one, …) as one axis
        shape = [-1, *(size.get_length() for size in list(source.get_partial_shape())[2:])]
        weights = w.one("Reshape", w.of(source), w.constant(shape))
    else:
        weights = w.of(source)
    settings: Attributes = {
        "strides": ints(attributes["strides"]),
        "dilations": ints(attributes["dilations"]),
        "group": group,
    }
    settings["pads"] = _pads(node, attributes)
    if transposed:
        if node.get_input_size() > 2:
            raise LlmqError(
                f"{node.get_friendly_name()}: a transposed convolution of a given size has no place in ONNX"
            )
        settings["output_padding"] = ints(attributes["output_padding"])
    bias = _bias(node)
    more = [] if bias is None else [w.constant(needed(bias).astype(np.float32).reshape(-1))]
    made = w.one("ConvTranspose" if transposed else "Conv", w.of(node.input_value(0)), weights, *more, **settings)
    if bias is not None:
        w.named[users(node)[0].get_name(), 0] = made
    return made


def _pads(node: Node, attributes: Attributes) -> list[int]:
    if attributes.get("auto_pad", "explicit") not in ("explicit", "valid", "notset"):
        raise LlmqError(f"{node.get_friendly_name()}: padding {attributes['auto_pad']} has no place in ONNX")
    return [*ints(attributes["pads_begin"]), *ints(attributes["pads_end"])]


def _bias(node: Node) -> Output | None:
    """The constant that the only reader of a convolution adds to each channel, or None."""
    readers = users(node)
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return None
    others = [v for v in readers[0].input_values() if v.get_node().get_name() != node.get_name()]
    array = constant_of(others[0]) if len(others) == 1 else None
    channels = node.get_output_partial_shape(0)[1]
    rank = rank_of(node.output(0))
    fits = array is not None and array.shape == (1, channels.get_length(), *(1,) * (rank - 2))
    return others[0] if fits else None


def matmul(w: Writer, node: Node, attributes: Attributes) -> Written:
    sides = [_side(w, node.input_value(i), bool(attributes[f"transpose_{'ab'[i]}"])) for i in (0, 1)]
    return w.one("MatMul", *sides)


def _side(w: Writer, output: Output, turned: bool) -> str:
    rank = rank_of(output)
    if not turned or rank < 2:
        return w.of(output)
    order = [*range(rank - 2), rank - 1, rank - 2]
    weight = stored(output)
    return w.weight(weight.transposed(order)) if weight else w.one("Transpose", w.of(output), perm=order)


def attention(w: Writer, node: Node, attributes: Attributes) -> Written:
    """softmax(q k^T * scale + mask) v."""
    if attributes["causal"]:
        raise LlmqError(f"{node.get_friendly_name()}: causal attention has no place in the ONNX graph")
    q, k, v = (w.of(node.input_value(i)) for i in range(3))
    rank = rank_of(node.input_value(1))
    scores = w.one("MatMul", q, w.one("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2]))
    if node.get_input_size() > 4:
        scale = w.of(node.input_value(4))
    else:
        width = node.input_value(0).get_partial_shape()[-1].get_length()
        scale = w.constant(np.array(1 / math.sqrt(width), np.float32))
    scores = w.one("Mul", scores, scale)
    if _is_masked(node):
        mask = node.input_value(3)
        if mask.get_element_type().get_type_name() == "boolean":
            scores = w.one("Where", w.of(mask), scores, w.constant(np.array(-np.inf, np.float32)))
        else:
            scores = w.one("Add", scores, w.of(mask))
    return w.one("MatMul", w.one("Softmax", scores, axis=-1), v)


def _is_masked(node: Node) -> bool:
    """True unless there is no mask, or a lone zero."""
    array = constant_of(node.input_value(3)) if node.get_input_size() > 3 else np.zeros(1)
    return array is None or array.size > 1 or bool(array.any())


def normalized(w: Writer, node: Node, attributes: Attributes) -> Written:
    """Less the mean and, if asked for, over the deviation."""
    x = w.of(node.input_value(0))
    axes = ints(needed(node.input_value(1)).reshape(-1))
    less = w.one("Sub", x, w.one("ReduceMean", x, axes=axes, keepdims=1))
    if not attributes["normalize_variance"]:
        return less
    two, least = (w.constant(np.array(number, np.float32)) for number in (2, attributes["eps"]))
    variance = w.one("ReduceMean", w.one("Pow", less, two), axes=axes, keepdims=1)
    if attributes["eps_mode"] == "inside_sqrt":
        return w.one("Div", less, w.one("Sqrt", w.one("Add", variance, least)))
    return w.one("Div", less, w.one("Add", w.one("Sqrt", variance), least))


def group_normalized(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, scale, shift = (w.of(node.input_value(i)) for i in range(3))
    groups = int(attributes["num_groups"])
    each = w.one("Reshape", x, w.constant([0, groups, -1]))
    ones = [w.constant(np.full(groups, number, np.float32)) for number in (1, 0)]
    normal = w.one("InstanceNormalization", each, *ones, epsilon=float(attributes["epsilon"]))
    back = w.one("Reshape", normal, w.one("Shape", x))
    shape = w.constant([-1, *(1,) * (rank_of(node.input_value(0)) - 2)])  # of (channels,)
    return w.one("Add", w.one("Mul", back, w.one("Reshape", scale, shape)), w.one("Reshape", shift, shape))


def fake_quantize(w: Writer, node: Node, attributes: Attributes) -> Written:
    """Quantized to uint8 and back, on the same points."""
    low, high, *out = [needed(node.input_value(i)).astype(np.float64) for i in range(1, 5)]
    if attributes["levels"] != 256 or not all(np.allclose(a, b) for a, b in zip((low, high), out, strict=True)):
        raise LlmqError(f"{node.get_friendly_name()}: {attributes['levels']} levels have no place in 8 bits of ONNX")
    scale = (high - low) / 255
    zero = -low / scale
    if np.abs(zero - zero.round()).max() > 0.01:
        raise LlmqError(f"{node.get_friendly_name()}: zero lies between two points of the grid")
    x = w.of(node.input_value(0))
    scale, zero = scale.astype(np.float32), zero.round().astype(np.float32)
    if max(scale.size, zero.size) == 1:
        grid = [w.constant(scale.reshape(())), w.constant(zero.astype(np.uint8).reshape(()))]
        return w.one("DequantizeLinear", w.one("QuantizeLinear", x, *grid), *grid)
    # A range for each channel: ONNX Runtime 1.32 fuses such nodes with a convolution that then fails.
    grid = [w.constant(np.array(1, np.float32)), w.constant(np.array(0, np.uint8))]
    factor, shift = w.constant(scale), w.constant(zero)
    codes = w.one("QuantizeLinear", w.one("Add", w.one("Div", x, factor), shift), *grid)
    return w.one("Mul", w.one("Sub", w.one("DequantizeLinear", codes, *grid), shift), factor)


def pooled(w: Writer, node: Node, attributes: Attributes) -> Written:
    largest = node.get_type_name() == "MaxPool"
    settings: Attributes = {"kernel_shape": ints(attributes["kernel"]), "strides": ints(attributes["strides"])}
    settings |= {"pads": _pads(node, attributes), "ceil_mode": int(attributes["rounding_type"] != "floor")}
    if largest:
        settings["dilations"] = ints(attributes.get("dilations", [1] * len(attributes["kernel"])))
    else:
        settings["count_include_pad"] = int(not attributes["exclude-pad"])
    return w.one("MaxPool" if largest else "AveragePool", w.of(node.input_value(0)), **settings)

"""The operations of an OpenVINO graph that choose, order and shape numbers, as operations of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmq.errors import LlmqError
from llmq.vision.onnx.writer import Attributes, Writer, constant_of, ints, needed, rank_of

if TYPE_CHECKING:
    from openvino import Node, Output

END = 2**31 - 1
"""An index beyond any axis."""
Written = str | list[str]


def _reshape(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, shape = node.input_values()
    return w.one("Reshape", w.of(x), w.int64(shape), allowzero=int(not attributes["special_zero"]))


def _transpose(w: Writer, node: Node, attributes: Attributes) -> Written:
    order = ints(needed(node.input_value(1)))
    return w.one("Transpose", w.of(node.input_value(0)), perm=order or [*reversed(range(rank_of(node.output(0))))])


def _gather(w: Writer, node: Node, attributes: Attributes) -> Written:
    if attributes.get("batch_dims"):
        raise LlmqError(f"{node.get_friendly_name()}: a gather over batches has no place in ONNX")
    axis = int(needed(node.input_value(2)).reshape(-1)[0])
    return w.one("Gather", w.of(node.input_value(0)), w.of(node.input_value(1)), axis=axis)


def _gather_parts(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, places = node.input_values()
    return w.one("GatherND", w.of(x), _wide(w, places), batch_dims=int(attributes.get("batch_dims", 0)))


def _shape(w: Writer, node: Node, attributes: Attributes) -> Written:
    return _as_told(w, node, w.one("Shape", w.of(node.input_value(0))))


def _as_told(w: Writer, node: Node, name: str, output: int = 0) -> str:
    """An int64 as the dtype that the operation's output has."""
    kind = node.output(output).get_element_type().get_type_name()
    return name if kind == "i64" else w.one("Cast", name, to=w.element(kind))


def _broadcast(w: Writer, node: Node, attributes: Attributes) -> Written:
    if attributes["mode"] not in ("numpy", "bidirectional"):
        raise LlmqError(f"{node.get_friendly_name()}: a broadcast by {attributes['mode']} axes has no place in ONNX")
    return w.one("Expand", w.of(node.input_value(0)), w.int64(node.input_value(1)))


def _squeeze(w: Writer, node: Node, attributes: Attributes) -> Written:
    axes = [w.int64(node.input_value(1))] if node.get_input_size() > 1 else []
    return w.one(node.get_type_name(), w.of(node.input_value(0)), *axes)


def _split(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, axis = node.input_value(0), int(needed(node.input_value(1)).reshape(-1)[0])
    lengths = []
    if node.get_input_size() > 2:
        made = [output.get_partial_shape()[axis] for output in node.outputs()]  # a length of -1 is the rest
        told = [size.get_length() for size in made] if not any(size.is_dynamic for size in made) else None
        lengths = [w.int64(node.input_value(2)) if told is None else w.constant(told)]
    return w.add("Split", w.of(x), *lengths, outputs=node.get_output_size(), axis=axis)


def _convert(w: Writer, node: Node, attributes: Attributes) -> Written:
    kind = node.output(0).get_element_type().get_type_name()
    return w.one("Cast", w.of(node.input_value(0)), to=w.element(kind))


def _slice(w: Writer, node: Node, attributes: Attributes) -> Written:
    start, stop, step, *axes = node.input_values()[1:]
    names = [w.int64(start), w.int64(stop)]
    names += [w.int64(axes[0]) if axes else w.constant([*range(len(needed(step)))]), w.int64(step)]
    return w.one("Slice", w.of(node.input_value(0)), *names)


def _strided_slice(w: Writer, node: Node, attributes: Attributes) -> Written:
    begin, end, steps = (needed(v).astype(np.int64).copy() for v in node.input_values()[1:4])
    if any(attributes["new_axis_mask"]) or any(attributes["ellipsis_mask"]):
        raise LlmqError(f"{node.get_friendly_name()}: a slice that adds axes has no place in ONNX")
    lone = [axis for axis, is_lone in enumerate(attributes["shrink_axis_mask"]) if is_lone]
    for axis in range(len(begin)):
        forwards = steps[axis] > 0
        if axis < len(attributes["begin_mask"]) and attributes["begin_mask"][axis]:
            begin[axis] = 0 if forwards else END
        if axis < len(attributes["end_mask"]) and attributes["end_mask"][axis]:
            end[axis] = END if forwards else -END
        if axis in lone:
            end[axis] = begin[axis] + 1 or END  # -1 is the last
    names = [w.constant(part) for part in (begin, end, np.arange(len(begin)), steps)]
    made = w.one("Slice", w.of(node.input_value(0)), *names)
    return w.one("Squeeze", made, w.constant(lone)) if lone else made


def _tile(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, counts = node.input_values()
    name, times = w.of(x), w.int64(counts)
    lacking = counts.get_partial_shape()[0].get_length() - rank_of(x)
    if lacking > 0:  # ONNX wants as many axes as counts
        name = w.one("Unsqueeze", name, w.constant([*range(lacking)]))
    if lacking < 0:
        times = w.one("Concat", w.constant([1] * -lacking), times, axis=0)
    return w.one("Tile", name, times)


def _range(w: Writer, node: Node, attributes: Attributes) -> Written:
    kind = w.element(node.output(0).get_element_type().get_type_name())
    return w.one("Range", *(w.one("Cast", w.of(v), to=kind) for v in node.input_values()))


def _cumulated(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, axis = map(w.of, node.input_values())
    return w.one("CumSum", x, axis, exclusive=int(attributes["exclusive"]), reverse=int(attributes["reverse"]))


def _padded(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, begin, end, *value = node.input_values()
    mode = str(attributes["pad_mode"]).lower()
    if mode not in ("constant", "reflect", "edge"):
        raise LlmqError(f"{node.get_friendly_name()}: padding {mode} has no place in ONNX")
    pads = w.one("Concat", w.int64(begin), w.int64(end), axis=0)
    filled = [w.of(value[0])] if value and mode == "constant" else []
    return w.one("Pad", w.of(x), pads, *filled, mode=mode)


def _to_space(w: Writer, node: Node, attributes: Attributes) -> Written:
    mode = {"blocks_first": "DCR", "depth_first": "CRD"}[attributes["mode"]]
    return w.one("DepthToSpace", w.of(node.input_value(0)), blocksize=int(attributes["block_size"]), mode=mode)


def _top(w: Writer, node: Node, attributes: Attributes) -> Written:
    x, k = node.input_values()
    largest = int(attributes["mode"] == "max")
    values, places = w.add(
        "TopK", w.of(x), w.int64(k), outputs=2, axis=int(attributes["axis"]), largest=largest, sorted=1
    )
    return [values, _as_told(w, node, places, 1)]


def _resized(w: Writer, node: Node, attributes: Attributes) -> Written:
    """An image of another size, by scales or by sizes of its last axes."""
    x, sizes, *more = node.input_values()
    rank, version = rank_of(x), node.get_type_info().version_id
    by_sizes = attributes["shape_calculation_mode"] == "sizes"
    told = sizes if version == "opset11" or by_sizes else more[0]
    axes_of = more[-1] if version == "opset11" else more[1] if len(more) > 1 else None
    axes = ints(needed(axes_of)) if axes_of is not None else [*range(rank)]
    if (
        axes != [*range(rank - len(axes), rank)]
        or any(attributes["pads_begin"])
        or any(attributes["pads_end"])
        or attributes["antialias"]
    ):
        raise LlmqError(f"{node.get_friendly_name()}: this resizing has no place in ONNX")
    modes = {"nearest": "nearest", "linear_onnx": "linear", "linear": "linear", "cubic": "cubic"}
    settings: Attributes = {
        "mode": modes[attributes["mode"]],
        "coordinate_transformation_mode": attributes["coordinate_transformation_mode"],
        "cubic_coeff_a": float(attributes["cube_coeff"]),
    }
    if attributes["mode"] == "nearest":
        settings["nearest_mode"] = attributes["nearest_mode"]
    name = w.of(x)
    before = rank - len(axes)
    if by_sizes:
        kept = w.one("Slice", w.one("Shape", name), w.constant([0]), w.constant([before]))
        return w.one("Resize", name, "", "", w.one("Concat", kept, w.int64(told), axis=0), **settings)
    array = constant_of(told)
    if array is not None:
        scales = w.constant(np.array([*np.ones(before), *array.reshape(-1)], np.float32))
    else:
        scales = w.one("Concat", w.constant(np.ones(before, np.float32)), w.of(told), axis=0)
    return w.one("Resize", name, "", scales, **settings)


def _whole(w: Writer, node: Node, attributes: Attributes) -> Written:
    x = w.of(node.input_value(0))
    if not node.output(0).get_element_type().is_real():
        return x  # integers are whole, and ONNX rounds floats alone
    return w.one({"Floor": "Floor", "Ceiling": "Ceil"}[node.get_type_name()], x)


def _scattered(w: Writer, node: Node, attributes: Attributes) -> Written:
    """A copy of the first input with other numbers at some places."""
    x, places, numbers = node.input_values()
    if attributes.get("reduction", "none") != "none":
        raise LlmqError(f"{node.get_friendly_name()}: an update by {attributes['reduction']} has no place in ONNX")
    return w.one("ScatterND", w.of(x), _wide(w, places), w.of(numbers))


def _wide(w: Writer, places: Output) -> str:
    """Indices as int64, which is what ONNX takes."""
    is_wide = places.get_element_type().get_type_name() == "i64"
    return w.of(places) if is_wide else w.one("Cast", w.of(places), to=w.element("i64"))


def _not_equal(w: Writer, node: Node, attributes: Attributes) -> Written:
    return w.one("Not", w.one("Equal", *map(w.of, node.input_values())))


SHAPES: dict[str, Callable[[Writer, Node, Attributes], Written]] = {
    "Broadcast": _broadcast,
    "Convert": _convert,
    "ConvertLike": _convert,
    "CumSum": _cumulated,
    "Ceiling": _whole,
    "DepthToSpace": _to_space,
    "Floor": _whole,
    "Gather": _gather,
    "GatherND": _gather_parts,
    "Interpolate": _resized,
    "NotEqual": _not_equal,
    "Pad": _padded,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterNDUpdate": _scattered,
    "ShapeOf": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "Tile": _tile,
    "TopK": _top,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
    "VariadicSplit": _split,
}

"""Whether each int8 activation of an ONNX file is what the graph gives for the same int8 activations before it.

Of a whole network no two engines agree to one step: a sum at the edge of two integers comes out as either, and later
layers amplify that. Layer by layer they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmq.vision.exported import ExportedModule
from llmq.vision.onnx.library import onnx, session
from llmq.vision.onnx.writer import needed

if TYPE_CHECKING:
    from openvino import Model as Graph
    from openvino import Node
    from torch import Tensor

    from llmq.vision.onnx.module import OnnxModule

ROUNDING = "FakeQuantize"
FED = "_told"
"""Ends the name of an input that stands for an int8 activation."""


def most_steps(graph: Graph, floats: Graph, made: OnnxModule, x: Tensor) -> tuple[int, float]:
    """The most steps by which an int8 activation of `made` is off, and the largest error of an output, over its range.

    `made` is written from `graph`; `floats` is the same graph as it is run, with weights as floats.
    """
    roundings = [op.get_friendly_name() for op in graph.get_ordered_ops() if op.get_type_name() == ROUNDING]
    told = floats.clone()
    by_name = {op.get_friendly_name(): op for op in told.get_ordered_ops()}
    told.add_outputs([by_name[name].output(0) for name in roundings])
    with torch.inference_mode():
        held: tuple[Tensor, ...] = ExportedModule(told)(x)
    truths = [t.numpy() for t in held]
    plain = len(truths) - len(roundings)
    codes = [_codes(by_name[name], values) for name, values in zip(roundings, truths[plain:], strict=True)]
    model, names = _cut(made.model)
    feeds = {name + FED: c for name, c in zip(names, codes, strict=True)}
    found = session(model, 1).run(None, {"input": x.numpy(), **feeds})
    steps = [np.abs(f.astype(int) - c.astype(int)).max() for f, c in zip(found[plain:], codes, strict=True)]
    ranges = [max(float(np.ptp(t)), 1e-12) for t in truths[:plain]]
    errors = [float(np.abs(f - t).max()) / r for f, t, r in zip(found, truths, ranges, strict=False)]
    return int(max(steps)), max(errors)


def _codes(rounding: Node, values: np.ndarray) -> np.ndarray:
    """The integers that rounded values stand for."""
    low, high = (needed(rounding.input_value(i)) for i in (1, 2))
    made: np.ndarray = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    return made


def _cut(held: bytes) -> tuple[bytes, list[str]]:
    """The model with each int8 activation as an output, and what reads it reading an input; the activations' names."""
    helper, kind = onnx().helper, onnx().TensorProto.UINT8
    model = onnx().load_model_from_string(held)
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for node in model.graph.node:
        node.input[:] = [name + FED if name in names else name for name in node.input]
    model.graph.input.extend(helper.make_tensor_value_info(name + FED, kind, None) for name in names)
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    return model.SerializeToString(), names

"""The weights of a graph: packed layers as integers with groups and scales, all other matrices in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.matrix.packed_linear import PackedLinear
from llmq.openvino_runtime import openvino

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from openvino import Model as Graph
    from openvino import Node

    from llmq.matrix.grid import Quantized

WORD = "llmq::packed"
"""The operation that stands for a packed layer between the trace and the graph."""


def in_float16(module: nn.Module) -> None:
    """Round each matrix of a float32 module to float16, where float16 holds it."""
    for parameter in module.parameters():
        rounded = parameter.data.half()
        if parameter.ndim > 1 and bool(rounded.isfinite().all()):
            parameter.data = rounded.to(parameter.dtype)


def packed_extensions(module: nn.Module) -> list[Any]:
    """The extensions of OpenVINO's frontend that write a packed layer as integers."""
    from openvino.frontend.pytorch import ConversionExtension, ModuleExtension

    layers = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
    number = {id(layer): i for i, layer in enumerate(layers)}

    def convert(context: Any) -> Any:
        layer = layers[int(context.get_values_from_const_input(1))]
        return product(context.get_input(0), layer.quantized(), layer.bias).outputs()

    # `evaluate` is given the arguments of the operation, not those of `forward`.
    as_operation = ModuleExtension(
        PackedLinear,
        WORD,
        evaluate=lambda layer, x, which: torch.zeros(*x.shape[:-1], layer.out_features),
        convert=lambda layer, operation, x: operation(x, torch.tensor(number[id(layer)])),
    )
    return [as_operation, ConversionExtension(WORD, convert)]


def restore(module: nn.Module) -> None:
    """Give packed layers their own `forward` back, which the frontend replaces and leaves so."""
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            layer.__dict__.pop("forward", None)


def is_exact(made: Quantized) -> bool:
    """True if a graph holds these codes as they are: all groups of one size. Zeros lie within the codes."""
    inputs, groups = len(made.g_idx), len(made.scales)
    even = bool((made.g_idx.bincount(minlength=groups) * groups == inputs).all())
    return even and (inputs * made.codes.shape[1]) % 2 == 0  # two codes share a byte


def product(x: Any, made: Quantized, bias: Tensor | None) -> Node:
    """`x @ weight.T + bias`; inputs that are out of the order of their groups are put in order first."""
    from openvino import opset13 as op

    order = made.g_idx.argsort(stable=True)
    if bool((order != torch.arange(len(order))).any()):
        x = op.gather(x, _constant(order.numpy()), op.constant(-1))
    node = op.matmul(x, weight(made, order), False, True)
    return node if bias is None else op.add(node, _constant(bias.detach().float().numpy()))


def weight(made: Quantized, order: Tensor) -> Node:
    """The weight `[outputs, inputs]`, inputs in `order`, as OpenVINO knows packed ones: (codes - zeros) * scales."""
    from openvino import opset13 as op

    inputs, outputs = made.codes.shape
    groups = len(made.scales)
    codes = made.codes[order].t().reshape(outputs, groups, inputs // groups).numpy()
    scales = made.scales.t().half().unsqueeze(-1).numpy()  # (outputs, groups, 1)
    zeros: NDArray[np.uint8] = made.zeros.t().unsqueeze(-1).numpy().astype(np.uint8)  # (outputs, groups, 1)
    packed = _bytes if made.bits == 8 else _nibbles
    # A symmetric grid has one zero for all.
    zero: Node = _constant(zeros[:1, :1]) if (zeros == zeros.flat[0]).all() else packed(zeros)
    less = op.subtract(op.convert(packed(codes), np.float16), op.convert(zero, np.float16))
    node = op.reshape(op.multiply(less, _constant(scales)), op.constant(np.array([outputs, inputs])), False)
    return op.convert(node, np.float32)


def _constant(array: NDArray[np.generic]) -> Node:
    from openvino import opset13 as op

    # An array that is not contiguous would become one of another type.
    return op.constant(np.ascontiguousarray(array))


def _bytes(codes: NDArray[np.uint8]) -> Node:
    return _constant(codes.astype(np.uint8))


def _nibbles(codes: NDArray[np.uint8]) -> Node:
    """A constant of 4 bits a code, two in a byte."""
    from openvino import opset13 as op

    ov = openvino()
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    tensor = ov.Tensor(np.ascontiguousarray(flat[::2] | flat[1::2] << 4), ov.Shape(codes.shape), ov.Type.u4)
    # A copy: memory that is shared would be that of an array which Python frees.
    return op.constant(tensor, shared_memory=False)


def compress(graph: Graph) -> None:
    """Store each float32 matrix of a graph in float16, from which it was rounded."""
    from openvino import opset13 as op

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino().Type.f32:
            continue
        values = node.data
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.ndim > 1 and values.size > 1 and (half.astype(np.float32) == values).all():
            stored = _constant(half)
            stored.set_friendly_name(node.get_friendly_name())
            wide = op.convert(stored, np.float32)
            readers: Sequence[Any] = list(node.output(0).get_target_inputs())
            for reader in readers:
                reader.replace_source_output(wide.output(0))

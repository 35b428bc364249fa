"""The weights of a graph as modules: the values of each, the bits that one is stored in, and the bytes of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from openvino import Model as Graph
    from openvino import Node

BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
"""Bits of a stored weight, by OpenVINO's names of dtypes."""
CODES = ("u4", "i4", "u8", "bf16")
"""Dtypes of weights that numpy does not hold number by number, or that count from a zero."""


class StoredWeight(nn.Module):
    """A weight in a graph, with the scales and zeros beside it."""

    def __init__(self, constant: Node, zero: Node | None, coding: list[Node]):
        super().__init__()
        self.constant, self.zero = constant, zero
        self.bits = BITS[kind_of(constant)]
        self.bytes_as_opened = sum(int(node.get_byte_size()) for node in (constant, *coding))

    def stored(self) -> Tensor:
        """The stored numbers less their zero: 0 where the weight is 0."""
        values = _numbers(self.constant)
        return values if self.zero is None else values - _numbers(self.zero)


def stored_weights(graph: Graph) -> Iterator[StoredWeight]:
    """Every weight of a graph: the constants of several floats, and the packed ones."""
    constants = [n for n in graph.get_ordered_ops() if n.get_type_name() == "Constant" and kind_of(n) in BITS]
    found = {}
    coding: set[str] = set()
    for node in constants:
        zero, scale = coding_of(node)
        if scale is not None:
            found[node.get_name()] = (zero, [each for each in (zero, scale) if each is not None])
            coding |= {each.get_name() for each in found[node.get_name()][1]}
    for node in constants:
        if node.get_name() not in coding and int(np.prod(node.get_output_shape(0))) > 1:
            yield StoredWeight(node, *found.get(node.get_name(), (None, [])))


def coding_of(constant: Node) -> tuple[Node | None, Node | None]:
    """The zeros and the scales of packed numbers, as they are decoded: (Convert - zeros) * scales."""
    if kind_of(constant)[0] not in "ui":
        return None, None
    zero = None
    node = _reader(constant, "Convert")
    if node is not None and (less := _reader(node, "Subtract")) is not None:
        zero, node = _constant(less.input_value(1).get_node()), less
    times = _reader(node, "Multiply") if node is not None else None
    return zero, None if times is None else _constant(times.input_value(1).get_node())


def _reader(node: Node, kind: str) -> Node | None:
    readers = (target.get_node() for target in node.output(0).get_target_inputs())
    return next((reader for reader in readers if reader.get_type_name() == kind), None)


def _constant(node: Node) -> Node | None:
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def kind_of(constant: Node) -> str:
    """OpenVINO's name of a constant's dtype."""
    return str(constant.get_element_type().get_type_name())


def _numbers(constant: Node) -> Tensor:
    """The numbers of a constant, each in an element of its own."""
    kind, shape = kind_of(constant), list(constant.get_output_shape(0))
    if kind not in ("u4", "i4"):
        data = constant.get_data() if kind != "bf16" else constant.get_data(dtype=np.float32)
        return torch.from_numpy(np.array(data, dtype=np.int16 if kind in ("u8", "i8") else None))
    held = constant.get_tensor_view().data.view(np.uint8).reshape(-1)
    flat = np.stack([held & 15, held >> 4], 1).reshape(-1)[: int(np.prod(shape))].astype(np.int16)
    flat = np.where(flat > 7, flat - 16, flat) if kind == "i4" else flat
    return torch.from_numpy(flat.reshape(shape))

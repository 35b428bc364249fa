"""The bytes of a GPTQ stage that is still to be written: of its layers on each grid, and of all the rest.

A safetensors file is a header in JSON and the tensors. Headers count as no shorter than they can be, so a stage is
never larger than foretold, and smaller by a few bytes a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from math import prod
from typing import TYPE_CHECKING

from llmq.matrix.gptq_format import TENSORS

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.text.grids import Grid
    from llmq.text.skeleton import Skeleton

LARGEST = 10**13
"""An offset with as many digits as any file needs."""
FILE = 8 + len('{"__metadata__":{"format":"pt"}}') + 8
"""The length of the header, its frame, and spaces that fill it up to 8 bytes."""


def bytes_packed(source: Skeleton, layer: str, grid: Grid) -> int:
    """The bytes of the four tensors of a layer on a grid, with their entries in the header."""
    linear = source.linear(layer)
    inputs, outputs = linear.in_features, linear.out_features
    groups = 1 if grid.group_size == -1 else inputs // grid.group_size
    words = [inputs * grid.bits // 32, outputs], [groups, outputs * grid.bits // 32]
    shapes = *words, [groups, outputs], [inputs]
    sizes = 4, 4, 2, 4  # int32, int32, float16, int32
    name = source.file_name(layer)
    total = 0
    for part, shape, size in zip(TENSORS, shapes, sizes, strict=True):
        total += size * prod(shape) + _entry(f"{name}.{part}", shape)
    return total


def bytes_dense(source: Skeleton, layer: str) -> int:
    """The bytes of the weight of a layer that stays as it is."""
    shape = list(source.linear(layer).weight.shape)
    itemsize: int = source.dtype.itemsize
    return itemsize * prod(shape) + _entry(source.file_name(f"{layer}.weight"), shape)


def bytes_of_block(source: Skeleton, block: str, layers: Collection[str]) -> int:
    """The bytes of the file of a block without the weights of `layers`."""
    weights = {f"{layer}.weight" for layer in layers}
    return _bytes_of_file(
        source, ((name, tensor) for name, tensor in source.held(block).items() if name not in weights)
    )


def bytes_outside(source: Skeleton) -> int:
    """The bytes of the file of all that lies outside the blocks."""
    return _bytes_of_file(source, source.outside())


def _bytes_of_file(source: Skeleton, tensors: Iterable[tuple[str, Tensor]]) -> int:
    total: int = FILE
    for name, tensor in tensors:
        total += tensor.nbytes + _entry(source.file_name(name), list(tensor.shape))
    return total


def _entry(name: str, shape: list[int]) -> int:
    entry = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [LARGEST, LARGEST]}}
    return len(json.dumps(entry, separators=(",", ":"))) - 1  # two braces less, a comma more

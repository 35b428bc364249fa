"""Unpacking in one pass, by a function in C.

PyTorch has no such operation, and six of its own take three to ten times as long: the layers of a prompt of 256 tokens
then wait for them a third of their time. Without a compiler they do the work, to the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from llmq.matrix.native import library

if TYPE_CHECKING:
    from torch import Tensor

Unpack = Callable[["Tensor", "Tensor | None", "Tensor", "Tensor", int], None]
"""(packed, upper 4 bits or None, scales and shifts, weight, group size): fills the weight `[inputs, outputs]`."""


@cache
def compiled() -> Unpack | None:
    """The function in C; None without a compiler."""
    found = library("unpack")
    if found is None:
        return None
    function = found.unpack
    function.restype, function.argtypes = None, [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3

    def unpack(packed: Tensor, high: Tensor | None, scales: Tensor, weight: Tensor, group: int) -> None:
        upper = None if high is None else high.data_ptr()
        function(packed.data_ptr(), upper, scales.data_ptr(), weight.data_ptr(), *weight.shape, group)

    return unpack

"""Products of float32 rows with a weight that stays in float16: for a head that would take twice its bytes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from llmq.matrix.native import library

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 16
"""Of the number of inputs."""


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` for rows `(n, inputs)` in float32 and a weight `(outputs, inputs)` in float16, by the function.

    The numbers of a row are the same to the bit whatever rows stand beside it.
    """
    rows, made = rows.contiguous(), torch.empty(len(rows), len(weight))
    _compiled()(weight.data_ptr(), rows.data_ptr(), made.data_ptr(), *rows.shape, len(weight))
    return made


@cache
def is_quick() -> bool:
    """True if the function in C is there, and multiplies rightly on this processor."""
    if _compiled() is None:
        return False
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 2 * MULTIPLE, generator=random)
    weight = torch.randn(2 * MULTIPLE + 3, 2 * MULTIPLE, generator=random).half()
    return torch.allclose(product(rows, weight), rows @ weight.float().t(), rtol=0, atol=1e-4)


@cache
def _compiled() -> Any:
    found = library("half_product")
    if found is None:
        return None
    found.product.restype, found.product.argtypes = None, [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3
    return found.product

"""Products and activations that a backward pass makes again, since what they are made from is kept as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 2**16
"""Numbers of the smallest tensor that is made again: smaller ones take less memory than time."""
MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(node._saved_self, approximate=node._saved_approximate),
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
}
"""The kind of a node of autograd's graph -> its output, from what the node keeps for its own gradient.

A node lets go of that after its own gradient, which comes after those of all that took its output.
"""


def made_again() -> AbstractContextManager[None]:
    """Keep no output of `MAKERS` for the backward pass of what runs within; the same operation makes the same bits."""
    return cast(AbstractContextManager[None], torch.autograd.graph.saved_tensors_hooks(_pack, _unpack))


def _pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
    whole = tensor if tensor._base is None else tensor._base
    node = whole.grad_fn
    maker = None if node is None or whole.numel() < LEAST else MAKERS.get(node.name())
    if maker is None or tensor.dtype != whole.dtype or not _has_factors(node):
        return tensor
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    return lambda: maker(node).as_strided(shape, strides, offset)


def _has_factors(node: Any) -> bool:
    """True unless a product has let go of a factor: it keeps one only where the other needs a gradient."""
    return node.name() != "MulBackward0" or all(function for function, _ in node.next_functions)


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()

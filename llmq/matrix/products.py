"""Products of bfloat16 matrices on a processor that has none in hardware: in float32, at several times the speed.

Without such instructions oneDNN widens each number on its way through the product. Here both factors are widened once,
multiplied in float32 and rounded once: sums of the same products, in another order (1 output in 10,000 is rounded to
its neighbour). `scripts/bench_products` times both.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import DispatchKeySet, Tensor

PRODUCTS = {"mm": 1, "addmm": 2, "bmm": 1, "baddbmm": 2}
"""Operation of ATen -> the place of its last factor among its tensors."""
ROWS = 16
"""Below this many rows, widening the right factor costs more than it gives."""


def lacks_bfloat16() -> bool:
    """True for an x86 processor whose bfloat16 products are emulated."""
    import torch

    able = torch.cpu.get_capabilities()
    return able.get("architecture") == "x86_64" and not (able.get("avx512_bf16") or able.get("amx_bf16"))


@cache
def widen() -> torch.library.Library | None:
    """Let this process multiply bfloat16 matrices in float32, if its processor lacks bfloat16."""
    return override() if lacks_bfloat16() else None


def override() -> torch.library.Library:
    """ATen's products on processors, widened for as long as what is returned lives."""
    import torch

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, last in PRODUCTS.items():
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        library.impl(name, partial(_product, kernel, last), "CPU", with_keyset=True)  # type: ignore[no-untyped-call]
    return library


def _product(kernel: Any, last: int, keys: DispatchKeySet, *tensors: Tensor, **scalars: float) -> Tensor:
    """The product of the last two tensors, `[..., rows, k] @ [..., k, columns]`, by ATen's own kernel."""
    import torch

    wide = tensors[last].dtype == torch.bfloat16 and tensors[last - 1].shape[-2] >= ROWS
    if not wide:
        made: Tensor = kernel.call_boxed(keys, *tensors, **scalars)
        return made
    widened: Tensor = kernel.call_boxed(keys, *(tensor.float() for tensor in tensors), **scalars)
    return widened.bfloat16()

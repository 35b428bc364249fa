"""Sums over the inputs of a layer: their Gram matrix `X^T X`, which GPTQ calls the Hessian, or its diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 192
"""Columns of a tile, or an eighth of all columns if that is more. Only the tiles up to the diagonal are computed."""
TOGETHER = 1024
"""Rows multiplied at a time: with fewer, reading and writing the sum takes longer than the products."""

Kind = Literal["hessian", "squares", "magnitudes"]
"""The whole Gram matrix, its diagonal alone, or the sum of the absolute values."""


class Gram:
    """A float32 sum over all inputs of a layer; float32 holds the products of bfloat16 inputs exactly.

    `weights` `(rows,)` are those of all rows to come, in order; without, each row weighs 1.
    """

    def __init__(self, kind: Kind, weights: Tensor | None = None):
        self.kind, self._weights = kind, weights
        self._added = 0  # rows
        self._sum: Tensor | None = None  # (features, features), or (features,)
        self._rows: Tensor  # (TOGETHER, features): the first `_count` are not in the sum yet
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Add activations `[..., features]`."""
        import torch

        flat = self._weighted(inputs.reshape(-1, inputs.shape[-1]))  # (tokens, features)
        if self._sum is None:
            width, self._dtype = flat.shape[1], flat.dtype
            shape = (width, width) if self.kind == "hessian" else (width,)
            self._sum = torch.zeros(shape, dtype=torch.float32, device=flat.device)
            if self.kind == "hessian":
                self._rows = self._sum.new_empty(TOGETHER, width)
        if self.kind != "hessian":
            values = flat.float()
            self._sum += (values.square() if self.kind == "squares" else values.abs()).sum(0)
            return
        for piece in torch.split(flat, TOGETHER):
            if self._count + len(piece) > TOGETHER:
                self._multiply(self._sum)
            self._rows[self._count : self._count + len(piece)] = piece
            self._count += len(piece)

    def _weighted(self, rows: Tensor) -> Tensor:
        start, self._added = self._added, self._added + len(rows)
        if self._weights is None:
            return rows
        weights = self._weights[start : self._added].unsqueeze(1)  # (rows, 1)
        # Rows keep their dtype, in which their products are exact.
        return (rows * (weights if self.kind == "magnitudes" else weights.sqrt())).to(rows.dtype)

    def total(self) -> Tensor:
        """The sum: `[features, features]`, or its diagonal `[features]`."""
        assert self._sum is not None  # the sum of a group is read only after all batches reached the group
        if self.kind == "hessian":
            self._multiply(self._sum)
            del self._rows
            for tile in _tiles(len(self._sum)):
                # The matrix is symmetric: the part above the diagonal is the part below, transposed.
                self._sum[: tile.start, tile] = self._sum[tile, : tile.start].t()
        return self._sum

    def _multiply(self, total: Tensor) -> None:
        values = self._rows[: self._count]  # (rows, features)
        with products_of_bfloat16(self._dtype):
            for tile in _tiles(len(total)):
                total[tile, : tile.stop].addmm_(values[:, tile].t(), values[:, : tile.stop])
        self._count = 0


def _tiles(width: int) -> Iterator[slice]:
    size = max(TILE, width // 8)
    return (slice(start, min(start + size, width)) for start in range(0, width, size))


@contextmanager
def products_of_bfloat16(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products on a processor take their factors as bfloat16: twice as fast, and exact for bfloat16 data.

    The sums stay in float32; a plain bfloat16 product would round them to 8 bits.
    """
    import torch

    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    kept = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = kept

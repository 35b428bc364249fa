"""Rounding to a grid: a scale and a zero point for each group of weights that share an output.

Weights lie here as `[inputs, outputs]`, a column of the matrix in a row of memory, which is also how the GPTQ format
packs them. A weight is `(code - zero) * scale` with `0 <= code < 2**bits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHRINKAGES = 16
SMALLEST = 0.5
"""The scale search tries `SHRINKAGES` smaller ranges, down to the share `SMALLEST` of the full range."""
LARGEST = 65280
"""The largest number that float16 and bfloat16 both hold."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: the codes, the grid of each group and output, and the group of each input."""

    codes: Tensor  # uint8 (inputs, outputs)
    scales: Tensor  # (groups, outputs)
    zeros: Tensor  # (groups, outputs)
    g_idx: Tensor  # int32 (inputs,)
    bits: int

    def weight(self) -> Tensor:
        """The float matrix `[outputs, inputs]` that the codes stand for."""
        groups = self.g_idx.long()  # (inputs,)
        scales = self.scales.float()
        return ((self.codes.float() - self.zeros.float()[groups]) * scales[groups]).t()

    def split(self, outputs: Sequence[int]) -> list[Quantized]:
        """The matrices that lie side by side along the outputs, given the number of outputs of each."""
        import torch

        wholes = self.codes, self.scales, self.zeros
        parts = zip(*(torch.split(each, list(outputs), 1) for each in wholes), strict=True)
        return [Quantized(codes, scales, zeros, self.g_idx, self.bits) for codes, scales, zeros in parts]


def find_grid(rows: Tensor, bits: int, sym: bool, mse: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero of each output from the weights `[..., inputs, outputs]` of one group: both `[..., outputs]`.

    Symmetric grids reach from `-max|w|` to `max|w|` with the zero in their middle; others from the least to the
    greatest weight, 0 always among them. With `mse` the range shrinks to that of the least squared error.
    Raises `UserError` for weights whose scale is beyond float16.
    """
    import torch

    low, high = rows.amin(-2).clamp(max=0), rows.amax(-2).clamp(min=0)  # (..., outputs) each
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    none = high == low  # all weights are 0, and any range will do
    low, high = low.masked_fill(none, -1), high.masked_fill(none, 1)
    if float((high - low).max()) / (2**bits - 1) > LARGEST:
        raise UserError(
            f"weights from {float(low.min()):.3g} to {float(high.max()):.3g} do not fit scales in float16, which the "
            "format keeps; leave the layer out with modules: {…: skip}"
        )
    scale, zero = _grid(low, high, bits, sym)
    if mse:
        least = _error(rows, scale, zero, bits)
        for share in torch.linspace(1, SMALLEST, SHRINKAGES + 1).tolist()[1:]:
            new_scale, new_zero = _grid(low * share, high * share, bits, sym)
            error = _error(rows, new_scale, new_zero, bits)
            better = error < least
            scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
            least = torch.minimum(least, error)
    return scale, zero


def _grid(low: Tensor, high: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    import torch

    top = 2**bits - 1
    # Files keep float16 and kernels take bfloat16; a scale that both can hold is the same everywhere.
    # 2**-24 is the smallest float16 above 0.
    scale = ((high - low) / top).bfloat16().half().clamp(2.0**-24, LARGEST).to(low.dtype)
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    # The GPTQ format keeps `zero - 1`, and its readers carry a stored -1 into the neighbouring zero.
    return scale, torch.round(-low / scale).clamp(1, top)


def _error(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The squared error of each output `[..., outputs]`."""
    return nearest(rows, scale.unsqueeze(-2), zero.unsqueeze(-2), bits).sub_(rows).square_().sum(-2)


def nearest(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The point of the grid nearest to each weight."""
    return (rows / scale).round_().clamp_(-zero, 2**bits - 1 - zero).mul_(scale)


def codes_of(points: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The codes, as bytes, of weights `[inputs, outputs]` that lie on their grid already, group after group."""
    import torch

    grouped = points.view(len(scales), -1, points.shape[1])  # (groups, inputs of a group, outputs)
    codes = (grouped / scales.unsqueeze(1)).add_(zeros.unsqueeze(1)).round_()
    return codes.to(torch.uint8).view_as(points)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, sym: bool, mse: bool = False) -> Quantized:
    """Each weight of `[outputs, inputs]` at the nearest point of the grid of its group."""
    import torch

    rows = weight.t().contiguous()  # (inputs, outputs)
    inputs = len(rows)
    size = inputs if group_size == -1 else group_size
    grouped = rows.view(inputs // size, size, -1)  # (groups, inputs of a group, outputs)
    scales, zeros = find_grid(grouped, bits, sym, mse)
    points = nearest(grouped, scales.unsqueeze(1), zeros.unsqueeze(1), bits).view_as(rows)
    g_idx = torch.arange(inputs, device=rows.device, dtype=torch.int32) // size
    return Quantized(codes_of(points, scales, zeros), scales, zeros, g_idx, bits)

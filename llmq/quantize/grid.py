"""Rounding to a grid: a scale and a zero point for each group of weights that share an output.

Weights lie here as `[inputs, outputs]`, a column of the matrix in a row of memory, which is also how the GPTQ format
packs them. A weight is `(code - zero) * scale` with `0 <= code < 2**bits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.errors import UserError

SHRINKAGES = 16
SMALLEST = 0.5
"""The scale search tries this many scales, from the full range down to this share of it."""
LARGEST = 65280
"""The largest scale that float16 and bfloat16 both hold."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: codes `[inputs, outputs]`, scales and zeros `[groups, outputs]`, group of each input."""

    codes: Any
    scales: Any
    zeros: Any
    g_idx: Any
    bits: int

    def weight(self) -> Any:
        """The float matrix `[outputs, inputs]` that it stands for."""
        groups = self.g_idx.long()
        scales = self.scales.float()
        return ((self.codes.float() - self.zeros.float()[groups]) * scales[groups]).t()

    def split(self, outputs: Sequence[int]) -> "list[Quantized]":
        """The matrices that it is made of, side by side along their outputs."""
        parts = zip(*(each.split(list(outputs), 1) for each in (self.codes, self.scales, self.zeros)), strict=True)
        return [Quantized(codes, scales, zeros, self.g_idx, self.bits) for codes, scales, zeros in parts]


def find_grid(rows: Any, bits: int, sym: bool, mse: bool = False) -> tuple[Any, Any]:
    """Scale and zero of each output from the weights `[..., inputs, outputs]` of one group: both `[..., outputs]`.

    Symmetric grids reach from `-max|w|` to `max|w|` with the zero in their middle; others from the least to the
    greatest weight, 0 always among them. With `mse` the range may shrink to where the squared error is least.
    Raises `UserError` for weights whose scale no float16 holds.
    """
    import torch

    low, high = rows.amin(-2).clamp(max=0), rows.amax(-2).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    none = high == low
    low, high = low.masked_fill(none, -1), high.masked_fill(none, 1)
    if float((high - low).max()) / (2**bits - 1) > LARGEST:
        raise UserError(
            f"weights from {float(low.min()):.3g} to {float(high.max()):.3g} do not fit scales in float16, which the "
            "format keeps; leave the layer out with modules: {…: skip}"
        )
    best = _grid(low, high, bits, sym)
    if mse:
        error = _error(rows, best, bits)
        for share in torch.linspace(1, SMALLEST, SHRINKAGES + 1).tolist()[1:]:
            candidate = _grid(low * share, high * share, bits, sym)
            its_error = _error(rows, candidate, bits)
            better = its_error < error
            best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
            error = torch.minimum(error, its_error)
    return best


def _grid(low: Any, high: Any, bits: int, sym: bool) -> tuple[Any, Any]:
    import torch

    top = 2**bits - 1
    # Files keep float16 and kernels take bfloat16; a scale that both can hold is the same everywhere.
    scale = ((high - low) / top).bfloat16().half().clamp(2.0**-24, LARGEST).to(low.dtype)
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    # The GPTQ format keeps `zero - 1`, and its readers carry a stored -1 into the neighbouring zero.
    return scale, torch.round(-low / scale).clamp(1, top)


def _error(rows: Any, grid: tuple[Any, Any], bits: int) -> Any:
    scale, zero = (value.unsqueeze(-2) for value in grid)
    return nearest(rows, scale, zero, bits).sub_(rows).square_().sum(-2)


def nearest(rows: Any, scale: Any, zero: Any, bits: int) -> Any:
    """The point of the grid nearest to each weight."""
    return (rows / scale).round_().clamp_(-zero, 2**bits - 1 - zero).mul_(scale)


def codes_of(points: Any, scales: Any, zeros: Any) -> Any:
    """The codes of weights `[inputs, outputs]` that lie on their grid already, group after group, as bytes."""
    import torch

    grouped = points.view(len(scales), -1, points.shape[1])
    codes = (grouped / scales.unsqueeze(1)).add_(zeros.unsqueeze(1)).round_()
    return codes.to(torch.uint8).view_as(points)


def round_to_nearest(weight: Any, bits: int, group_size: int, sym: bool, mse: bool = False) -> Quantized:
    """Each weight of `[outputs, inputs]` to the nearest point of its group's grid; nothing is made good."""
    import torch

    rows = weight.t().contiguous()
    inputs = len(rows)
    size = inputs if group_size == -1 else group_size
    grouped = rows.view(inputs // size, size, -1)
    scales, zeros = find_grid(grouped, bits, sym, mse)
    points = nearest(grouped, scales.unsqueeze(1), zeros.unsqueeze(1), bits).view_as(rows)
    g_idx = torch.arange(inputs, device=rows.device, dtype=torch.int32) // size
    return Quantized(codes_of(points, scales, zeros), scales, zeros, g_idx, bits)

"""Blocks of 32 weights as GGUF files hold them, made from codes on a grid without another rounding.

A block has a scale `d` in float16 and codes of 4, 5 or 8 bits. Symmetric types (`Q4_0`, `Q5_0`, `Q8_0`) mean
`d * (code - offset)`; the others (`Q4_1`, `Q5_1`) have a float16 minimum `m` and mean `d * code + m`.
Layout: github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llmq.matrix.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32


class Kind(NamedTuple):
    """A type of blocks: the bits of a code, the code of zero, and if a minimum is kept beside the scale."""

    bits: int
    offset: int
    has_minimum: bool


KINDS = {
    "Q4_0": Kind(4, 8, False),
    "Q4_1": Kind(4, 0, True),
    "Q5_0": Kind(5, 16, False),
    "Q5_1": Kind(5, 0, True),
    "Q8_0": Kind(8, 128, False),
}


@dataclass(frozen=True)
class Carried:
    """The rows of a matrix in blocks, with the largest distance to the grid in steps of the grid: 0 if equal."""

    rows: Tensor  # uint8 (outputs, bytes of a row)
    distance: float


def carried(made: Quantized, name: str) -> Carried | None:
    """A quantized matrix in blocks of type `name`; None if blocks cross groups, or codes or scales do not fit."""
    import torch

    kind = KINDS[name]
    inputs, outputs = made.codes.shape
    if inputs % BLOCK:
        return None
    groups = made.g_idx.view(-1, BLOCK).long()  # (blocks, 32)
    if not bool((groups == groups[:, :1]).all()):
        return None
    scales, zeros = (each[groups[:, 0]].t() for each in (made.scales, made.zeros))  # (outputs, blocks)
    d = scales.half()
    if not bool((d.float() == scales.float()).all()):  # NaN and what float16 rounds
        return None
    codes = made.codes.t().reshape(outputs, -1, BLOCK).to(torch.int16)  # (outputs, blocks, 32)
    minimum, distance = None, 0.0
    if kind.has_minimum:
        exact = -scales.double() * zeros.double()
        minimum = exact.half()
        distance = float(((minimum.double() - exact) / scales.double()).abs().max())
    else:
        codes = codes - zeros.to(torch.int16).unsqueeze(-1) + kind.offset
    if int(codes.min()) < 0 or int(codes.max()) >= 2**kind.bits or not distance < 1:  # not <: infinite, NaN
        return None
    return Carried(_rows(codes.to(torch.uint8), d, minimum, kind), distance)


def _rows(codes: Tensor, d: Tensor, minimum: Tensor | None, kind: Kind) -> Tensor:
    """The bytes of each row `(outputs, bytes)`, from codes `(outputs, blocks, 32)` and scales `(outputs, blocks)`."""
    import torch

    parts = [each.unsqueeze(-1).contiguous().view(torch.uint8) for each in (d, minimum) if each is not None]
    if kind.bits == 8:
        parts.append(codes ^ 0x80)  # as a signed byte: the code less 128
    else:
        if kind.bits == 5:  # the fifth bits of all codes first, from the lowest bit on
            high = (codes >> 4).view(*codes.shape[:2], 4, 8)
            parts.append((high << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8))
        low = codes & 0xF
        parts.append(low[..., :16] | (low[..., 16:] << 4))  # codes i and i + 16 share a byte
    return torch.cat(parts, -1).flatten(1)

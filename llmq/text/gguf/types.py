"""The type of each tensor of a GGUF file, and its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import LlmqError
from llmq.matrix.gguf_blocks import BLOCK, KINDS, carried
from llmq.matrix.grid import Quantized
from llmq.text.gguf.layout import EMBEDDING, HEAD, IN_FLOAT32, Place
from llmq.text.gguf.source import Source

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LARGEST = 65504.0
"""The largest number of float16."""
CARRIED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""The types that may hold a grid, in the order in which they are tried."""
ERRORS = {"Q4_0": 0.14, "Q4_1": 0.085, "Q5_0": 0.07, "Q5_1": 0.045, "Q8_0": 0.005, "F16": 2**-11, "BF16": 2**-8}
"""The largest error of a rounded weight, as a share of the largest of its block, or of itself in F16 and BF16."""
SMALL = 4e-6
"""The error of weights so small that float16 holds their scale inexactly."""

CHECKED = 2**20
"""Weights that are compared with the file at a time."""


@dataclass(frozen=True)
class Type:
    """The type of a tensor, if its grid was kept, and the reason where a grid was not kept."""

    name: str
    kept: bool = False
    distance: float = 0.0
    """The largest distance to the grid that was kept, in steps of the grid."""
    why_not: str = ""


def choose(place: Place, source: Source, wanted: str, is_head: bool) -> Type:
    """The type of a tensor: float32 for vectors, the type that keeps a grid, or else the `wanted` one."""
    shape = shape_of(place, source)
    if len(shape) == 1 or place.name.endswith(IN_FLOAT32):
        return Type("F32")
    why_not = ""
    if all(map(source.is_packed, place.parts)):
        grids = [_turned(source.packed(part), place) for part in place.parts]
        for name in CARRIED if wanted == "AUTO" else [wanted] if wanted in CARRIED else []:
            kept = [carried(grid, name) for grid in grids]
            distance = max((each.distance for each in kept if each), default=0.0)
            if all(kept) and (distance == 0 or (name == "Q4_1" and wanted == "AUTO")):
                return Type(name, True, distance)
        why_not = _why_not(grids[0]) if wanted == "AUTO" else ""
    if wanted in CARRIED and shape[-1] % BLOCK:
        return Type("F16", why_not=f"rows of {shape[-1]} weights make no blocks of {BLOCK}")
    if wanted in CARRIED:
        return Type("Q8_0" if is_head else wanted)
    if wanted != "AUTO":
        return Type(wanted)
    fits = all(float(source.tensor(part).abs().max()) <= LARGEST for part in place.parts)
    return Type("F16" if fits else "BF16", why_not=why_not)


def shape_of(place: Place, source: Source) -> tuple[int, ...]:
    """The shape of a tensor in the file."""
    part = place.parts[0]
    own = source.shape(part)
    # A packed layer lies as (outputs, inputs) already.
    return place.shape(own[::-1] if place.turned and source.is_packed(part) else own)


def _why_not(grid: Quantized) -> str:
    inputs = len(grid.g_idx)
    if bool((grid.g_idx.diff() < 0).any()):
        return "groups in the order of activations"
    if inputs % BLOCK or inputs // len(grid.scales) % BLOCK:
        return f"groups that {BLOCK} does not divide"
    return f"{grid.bits} bits with zeros that no type of blocks has"


def _turned(grid: Quantized, place: Place) -> Quantized:
    """A grid with its outputs in the order of the file."""
    rows = place.rows(grid.codes.shape[1])
    if rows is None:
        return grid
    return Quantized(grid.codes[:, rows], grid.scales[:, rows], grid.zeros[:, rows], grid.g_idx, grid.bits)


def values(place: Place, source: Source) -> Tensor:
    """A tensor in float32, as the file is to hold it."""
    import torch

    wholes = []
    for name in place.parts:
        part = source.tensor(name)
        wholes.append(place.there(part.t() if place.turned and source.is_packed(name) else part))
    return torch.stack(wholes) if len(wholes) > 1 else wholes[0]


def encoded(place: Place, source: Source, chosen: Type) -> np.ndarray:
    """The bytes of a tensor, in an array as `GGUFWriter` takes one."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if chosen.kept:
        grids = (carried(_turned(source.packed(part), place), chosen.name) for part in place.parts)
        rows = [grid.rows for grid in grids if grid]
        whole: np.ndarray = (torch.stack(rows) if len(rows) > 1 else rows[0]).numpy()
        return whole
    array = values(place, source).contiguous().numpy()
    if chosen.name in ("F32", "F16"):
        return array.astype(np.float32 if chosen.name == "F32" else np.float16)
    blocks: np.ndarray = quantize(array, GGMLQuantizationType[chosen.name])
    return blocks


def check(place: Place, source: Source, chosen: Type, held: np.ndarray) -> float:
    """The largest error of a tensor that was read back, as a share of the largest weight.

    Raises `LlmqError` for a tensor further from the model than its type rounds, or from a grid that it keeps.
    """
    import torch

    meant = values(place, source)
    if meant.shape != held.shape:
        raise LlmqError(f"{place.name} was read back as {held.shape}, and {tuple(meant.shape)} was written")
    largest = float(torch.maximum(meant.max(), -meant.min()))
    step = chosen.distance * _steps(place, source) if chosen.distance else 0.0
    # Embeddings are the largest tensor: differences and bounds of all rows at once would be five more of their size.
    rows, worst = max(1, CHECKED * len(meant) // meant.numel()), 0.0
    for i, part in enumerate(torch.split(meant, rows)):
        error = (torch.from_numpy(held[i * rows : (i + 1) * rows].copy()) - part).abs_()
        if not bool((error <= _bound(part, chosen, step, largest)).all()):  # not >: NaN
            told = f"{float(error.max()):.3g} from weights up to {largest:.3g}"
            raise LlmqError(f"{place.name} as {chosen.name} was read back further away than its rounding: {told}")
        worst = max(worst, float(error.max()))
    return worst / largest if largest else 0.0


def _bound(meant: Tensor, chosen: Type, step: float, largest: float) -> Tensor:
    """The largest error that the type may make of each weight; `step` is that of a grid that is kept."""
    import torch

    if chosen.name == "F32" or chosen.kept:
        # With fractional zero points `(code - zero) * scale` and `scale * code + minimum` differ in float32.
        return torch.full_like(meant, step * 1.01 + (2**-22 * largest if step else 0.0))
    if chosen.name in KINDS:
        blocks = meant.reshape(*meant.shape[:-1], -1, BLOCK).abs().amax(-1, keepdim=True)
        return (blocks * ERRORS[chosen.name] + SMALL).expand(*blocks.shape[:-1], BLOCK).reshape(meant.shape)
    return meant.abs() * ERRORS[chosen.name] + 2**-24


def _steps(place: Place, source: Source) -> float:
    """The largest step of the grids of a tensor."""
    return max(float(source.packed(part).scales.float().abs().max()) for part in place.parts)


def is_head(name: str, names: Mapping[str, object]) -> bool:
    """True for the output head, which is the embeddings where a file has no other."""
    return name == (HEAD if HEAD in names else EMBEDDING)

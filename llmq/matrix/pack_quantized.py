"""The `pack-quantized` format of compressed-tensors, as vLLM and transformers read it, and the way from GPTQ and back.

`weight_packed` int32 `[outputs, inputs * bits / 32]` holds the codes as a stream of bits along the inputs,
`weight_scale` `[outputs, groups]` the scales, `weight_zero_point` int32 `[outputs * bits / 32, groups]` the zeros along
the outputs, and `weight_shape` int64 the outputs and inputs. A grid whose zero is its middle has no zero points. Groups
lie in the order of the inputs, unless an older file has `weight_g_idx`. The streams are those of GPTQ, turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmq.matrix.gptq_format import from_tensors, pack
from llmq.matrix.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def to_tensors(made: Quantized, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of one layer whose groups lie in the order of the inputs."""
    import torch

    tensors = {
        "weight_packed": pack(made.codes, made.bits).t().contiguous(),
        "weight_scale": made.scales.t().contiguous(),
        "weight_shape": torch.tensor(made.codes.shape[::-1]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(made.zeros.t(), made.bits).contiguous()  # along the outputs
    return tensors


def to_quantized(tensors: Mapping[str, Tensor]) -> Quantized:
    """The quantized matrix that the tensors of a layer hold; `weight_zero_point` and `weight_g_idx` may be left out."""
    import torch

    outputs, inputs = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].t()  # (groups, outputs)
    bits = tensors["weight_packed"].shape[1] * 32 // inputs
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        middle = torch.full((outputs, len(scales)), 2 ** (bits - 1), dtype=torch.int32, device=scales.device)
        zeros = pack(middle, bits)
    order = tensors.get("weight_g_idx")
    if order is None:
        order = torch.arange(inputs, dtype=torch.int32, device=scales.device) // (inputs // len(scales))
    held = {"qweight": tensors["weight_packed"].t(), "scales": scales, "qzeros": zeros.t(), "g_idx": order}
    return from_tensors(held, bits, "gptq_v2")


def in_order(made: Quantized) -> bool:
    """True if the groups have one size and lie in the order of the inputs."""
    import torch

    inputs, groups = len(made.codes), len(made.scales)
    order = torch.arange(inputs, device=made.g_idx.device) // max(1, inputs // groups)
    return inputs % groups == 0 and torch.equal(made.g_idx.long(), order)


def is_symmetric(made: Quantized) -> bool:
    """True if each zero is the middle of the grid."""
    return bool((made.zeros == 2 ** (made.bits - 1)).all())

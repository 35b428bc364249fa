"""LoRA whose A pools its inputs by group over a packed grid, and its merge into the grid (QA-LoRA, Xu et al. 2024).

An input of such an adapter counts by the group it is in alone, so the product of B and A adds one number to all weights
of a group and an output: `(code - zero) * scale + change = (code - (zero - change / scale)) * scale`. The adapter folds
into the zero points, and codes and scales stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from llmq.errors import UserError
from llmq.guarded.files import read_json_object
from llmq.matrix.grid import Quantized
from llmq.text.formats import quantization

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import LoraConfig, PeftModel
    from torch import Tensor

GRID = "grid.safetensors"
"""The file beside float weights that lie on a grid: scales, zero points and bits of each layer."""


def group_of(folder: Path, asked: int | None) -> int:
    """The inputs that an adapter over a packed folder pools: those of a group of its grid, or `asked`, a multiple.

    Raises `UserError` for a folder without such groups.
    """
    settings = quantization(folder) or {}
    size = settings.get("group_size")
    if settings.get("quant_method") != "gptq" or not isinstance(size, int) or size < 1:
        raise UserError(
            "use_qalora pools the inputs of each group of a grid, and this stage has none; put quantize.gptq or "
            "quantize.rtn with a group_size before it"
        )
    if settings.get("desc_act"):
        raise UserError("use_qalora pools neighbouring inputs, and desc_act orders the groups otherwise; set it false")
    if asked and asked % size:
        raise UserError(f"qalora_group_size {asked} is no multiple of the groups of {size} inputs of this stage")
    return asked or size


def pools(adapter: Path) -> bool:
    """True if an adapter in a folder pools its inputs."""
    return bool(read_json_object(adapter / "adapter_config.json").get("use_qalora"))


def let_pool(config: LoraConfig) -> None:
    """Let PEFT put its pooling layer around our packed layers; it knows those of GPTQModel alone."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    from llmq.matrix.packed_linear import PackedLinear

    config._register_custom_module({PackedLinear: GPTQLoraLinear})


def check_pools(adapted: PeftModel) -> None:
    """Raise `UserError` for an adapter on a layer that is not packed, whose inputs PEFT would not pool."""
    from peft.tuners.lora.gptq import GPTQLoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, GPTQLoraLinear):
            raise UserError(f"use_qalora: {name} is not packed; name target_modules without it")
        if getattr(layer, "source_cls", None) is Conv1D:
            raise UserError(f"use_qalora: {name} is a Conv1D, which is trained with plain LoRA; leave use_qalora out")


def changes(adapted: PeftModel) -> dict[str, Tensor]:
    """The numbers `(pools, outputs)` that an adapter adds to the weights of each pool of inputs, by layer."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    check_pools(adapted)
    found = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, GPTQLoraLinear):
            (adapter,) = layer.active_adapters
            a, b = (part[adapter].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
            # PEFT takes the mean of a pool times the number of pools.
            factor = layer.scaling[adapter] * a.shape[1] / layer.qalora_group_size[adapter]
            found[name] = factor * (b @ a).t()  # a (r, pools), b (outputs, r)
    return found


def folded(made: Quantized, change: Tensor) -> Quantized:
    """A grid with a change `(pools, outputs)` in its zero points, each such that `-zero * scale` is a float16.

    GGUF's blocks keep that product, and so hold the grid without another rounding. Raises `UserError` for groups that
    lie in several pools.
    """
    inputs = len(made.g_idx)
    pools = torch.arange(inputs) // (inputs // len(change))  # the pool of each input
    of_group = torch.zeros(len(made.scales), dtype=torch.long).scatter_(0, made.g_idx.long(), pools)
    if not torch.equal(of_group[made.g_idx.long()], pools):
        raise UserError("the groups of this grid lie in several pools of the adapter, which does not fold into it")
    scales = made.scales.double()
    least = change.double()[of_group] - made.zeros.double() * scales  # the weight of code 0 (groups, outputs)
    return Quantized(made.codes, made.scales, (-least.half().double() / scales).float(), made.g_idx, made.bits)


def save_grid(grids: Mapping[str, Quantized], folder: Path) -> None:
    """Write scales and zero points of each layer beside the float weights."""
    tensors: dict[str, Tensor] = {}
    for name, grid in grids.items():
        tensors |= {f"{name}.scales": grid.scales.contiguous(), f"{name}.zeros": grid.zeros.float().contiguous()}
        tensors |= {f"{name}.g_idx": grid.g_idx.contiguous(), f"{name}.bits": torch.tensor(grid.bits)}
    save_file(tensors, folder / GRID)


def on_grid(weight: Tensor, tensors: Mapping[str, Tensor]) -> Quantized:
    """The codes of float weights `(outputs, inputs)` that lie on a grid but for the rounding of their dtype."""
    scales, zeros, g_idx = tensors["scales"], tensors["zeros"], tensors["g_idx"]
    groups, bits = g_idx.long(), int(tensors["bits"])
    codes = (weight.t().float() / scales.float()[groups] + zeros[groups]).round().clamp(0, 2**bits - 1)
    return Quantized(codes.to(torch.uint8), scales, zeros, g_idx, bits)

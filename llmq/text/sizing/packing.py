"""Packed parameters, exact to the byte: the GPTQ format, bitsandbytes, and adapters. Pure arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from llmq.sketch import BYTES, Part, Stored

if TYPE_CHECKING:
    from llmq.text.sizing.network import TextSketch

NF4_BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own, in bitsandbytes."""


def gptq(part: Part, bits: int, group_size: int) -> Part:
    """A matrix in the GPTQ format: codes, zeros, scales, and the group of each input."""
    outputs, inputs = part.shape
    groups = 1 if group_size < 0 else inputs // group_size
    layer = part.name.removesuffix(".weight")
    stored = (
        Stored(".qweight", "int32", (-(-inputs * bits // 32), outputs)),
        Stored(".qzeros", "int32", (groups, -(-outputs * bits // 32))),
        Stored(".scales", "float16", (groups, outputs)),
        Stored(".g_idx", "int32", (inputs,)),
    )
    held = sum(tensor.bytes for tensor in stored)
    if group := _kernel_group(part, inputs, groups):
        planes = 2 if bits == 8 else 1  # of 4 bits a weight, whatever the bits
        held = planes * (inputs * outputs // 2 + inputs // group * outputs * 2 * BYTES["bfloat16"])
    return replace(part, name=layer, stored=stored, opened=held, packed=True)


def _kernel_group(part: Part, inputs: int, groups: int) -> int:
    """The group of PyTorch's packed product for this layer; 0 where the layer stays as in the file."""
    from llmq.matrix.packed_linear import kernel_group

    return kernel_group(inputs, groups) if part.dtype == "bfloat16" and part.shape[0] % 16 == 0 else 0


def nf4(part: Part, quant_type: str, double_quant: bool, compute_dtype: str) -> Part:
    """A matrix in 4 bits of bitsandbytes, scales of 64 weights in float32, or in 8 bits with scales of their own."""
    count, blocks = part.weights, -(-part.weights // NF4_BLOCK)
    nested = -(-blocks // NESTED_BLOCK)
    state = {"quant_type": quant_type, "blocksize": NF4_BLOCK, "dtype": part.dtype, "shape": list(part.shape)}
    if double_quant:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.028937317430973053}
    told = len(json.dumps(state))
    scales = (
        (
            Stored(".absmax", "uint8", (blocks,)),
            Stored(".nested_absmax", "float32", (nested,)),
            Stored(".nested_quant_map", "float32", (256,)),
        )
        if double_quant
        else (Stored(".absmax", "float32", (blocks,)),)
    )
    stored = (
        Stored("", "uint8", (-(-count // 2), 1)),
        *scales,
        Stored(".quant_map", "float32", (16,)),
        Stored(f".quant_state.bitsandbytes__{quant_type}", "uint8", (told,)),
    )
    opened = sum(tensor.bytes for tensor in stored) - told + (4 if double_quant else 0)
    mapped = opened if repacks(part, compute_dtype) else 0
    return replace(part, dtype=compute_dtype, stored=stored, opened=opened, packed=True, mapped=mapped)


def repacks(part: Part, compute_dtype: str) -> bool:
    """True if bitsandbytes packs the codes anew before the first product, as it does for AVX-512 BF16."""
    import torch

    outputs, inputs = part.shape
    able = torch.cpu.get_capabilities().get("avx512_bf16") and not torch.cuda.is_available()
    return bool(able) and compute_dtype == "bfloat16" and outputs % 32 == 0 and inputs % 64 == 0


def int8(part: Part) -> Part:
    """A matrix of LLM.int8(): a byte a weight, a float32 scale for each output."""
    stored = (
        Stored("", "int8", part.shape),
        Stored(".SCB", "float32", (part.shape[0],)),
        Stored(".weight_format", "uint8", ()),
    )
    scale = replace(stored[1], name="SCB")
    names = replace(stored[2], name="weight_format")
    return replace(part, stored=(stored[0], scale, names), opened=stored[0].bytes + scale.bytes, packed=True)


def in_int8(part: Part) -> bool:
    """True for a matrix of LLM.int8()."""
    return any(tensor.name == "SCB" or tensor.name == ".SCB" for tensor in part.stored)


def adapters(parts: Iterable[Part], rank: int, dora: bool = False, pooled: bool = False) -> list[Part]:
    """The two float32 matrices of a LoRA for each linear layer, and the magnitudes of DoRA, named as in the file.

    If `pooled`, the first has one input for each group of a packed layer.
    """
    made = []
    for part in parts:
        outputs, inputs = part.shape
        if pooled and _is_gptq(part):
            inputs = next(tensor.shape[0] for tensor in part.stored if tensor.name == ".scales")
        layer = f"base_model.model.{part.name.removesuffix('.weight')}"
        made.append(Part.plain(f"{layer}.lora_A.weight", (rank, inputs), "float32", "adapter"))
        made.append(Part.plain(f"{layer}.lora_B.weight", (outputs, rank), "float32", "adapter"))
        if dora:
            made.append(Part.plain(f"{layer}.lora_magnitude_vector", (outputs,), "float32", "adapter"))
    return made


def pack_quantized(part: Part) -> Part:
    """A matrix of the GPTQ format in the pack-quantized format, its zeros left out as if they were symmetric."""
    held = {tensor.name: tensor for tensor in part.stored}
    codes, scales = held[".qweight"], held[".scales"]
    outputs = scales.shape[1]
    stored = (
        Stored(".weight_packed", "int32", (outputs, codes.shape[0])),
        Stored(".weight_scale", "bfloat16", scales.shape[::-1]),
        Stored(".weight_shape", "int64", (2,)),
    )
    return replace(part, stored=stored)


def gguf(part: Part, name: str) -> Part:
    """A matrix in blocks of a GGUF type; vectors stay in float32."""
    if len(part.shape) == 1:
        return replace(Part.plain(part.name, part.shape, "float32", part.role), opened=part.opened)
    size = int(part.weights * BITS_OF_GGUF[name] / 8)
    stored = (Stored("", "uint8", (size,)),)
    floats = part.weights * BYTES[part.dtype]
    return replace(part, stored=stored, opened=floats, packed=False, mapped=0)


def in_graph(part: Part) -> Part:
    """A parameter as a constant of an OpenVINO graph: codes as u4 or u8 with float16 scales, or float16."""
    held = {tensor.name: tensor for tensor in part.stored}
    if ".qweight" not in held:
        plain = Part.plain(part.name, part.shape, "float16", part.role)
        return replace(plain, dtype="float32")
    bits = held[".qweight"].shape[0] * 32 // part.shape[1]
    groups, outputs = held[".scales"].shape
    codes = part.weights if bits == 8 else part.weights // 2
    stored = (Stored("", "uint8", (codes,)), Stored(".scales", "float16", (groups, outputs)))
    return replace(part, stored=stored, opened=sum(t.bytes for t in stored), dtype="float32", mapped=0)


def type_that_keeps(part: Part) -> str:
    """The type of blocks that holds the grid of a packed matrix, as `auto` chooses it for a symmetric one."""
    held = {tensor.name: tensor for tensor in part.stored}
    if part.on_grid:
        return "Q4_1"
    if ".qweight" not in held:
        return "F16"
    bits = held[".qweight"].shape[0] * 32 // part.shape[1]
    return "Q8_0" if bits == 8 else "Q4_0"


ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""The types that leave the output head at Q8_0."""
BITS_OF_GGUF = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6}
"""The bits of a weight in each type of a GGUF file, scales included."""


def whole_copy(part: Part) -> Part:
    """The copy of a parameter that is trained whole and saved with the adapter."""
    return Part.plain(f"base_model.model.{part.name}", part.shape, "float32", "adapter")


def float_again(sketch: TextSketch, dtype: str) -> tuple[Part, ...]:
    """The parts without the adapter, each in a dtype of floats."""
    kept = [part for part in sketch.parts if part.role != "adapter"]
    inputs = {part.name: part.shape[-1] for part in sketch.parts if part.name.endswith(".lora_A.weight")}
    # An adapter that pools its inputs has fewer of them than its layer, and leaves the grid.
    pooled = any(0 < inputs.get(f"base_model.model.{part.name}.lora_A.weight", 0) < part.shape[-1] for part in kept)
    floats = (
        Part.plain(f"{part.name}.weight" if _is_gptq(part) else part.name, part.shape, dtype, part.role)
        for part in kept
    )
    return tuple(replace(made, on_grid=pooled and _is_gptq(part)) for made, part in zip(floats, kept, strict=True))


def grid_of(sketch: TextSketch) -> dict[str, object]:
    """The bits and the group size of the first packed layer in the GPTQ format, as settings; empty if there is none."""
    for part in filter(_is_gptq, sketch.parts):
        shapes = {tensor.name: tensor.shape for tensor in part.stored}
        inputs, groups = part.shape[1], shapes[".scales"][0]
        size = inputs // groups if groups > 1 else -1
        return {"bits": shapes[".qweight"][0] * 32 // inputs, "group_size": size}
    return {}


def in_planes(part: Part) -> bool:
    """True for codes that are opened in the layout of PyTorch's packed product, and not as in the file."""
    ours = any(tensor.name in (".qweight", ".weight_packed") for tensor in part.stored)
    return ours and part.opened != sum(tensor.bytes for tensor in part.stored)


def _is_gptq(part: Part) -> bool:
    return any(tensor.name == ".qweight" for tensor in part.stored)

"""Keeping bitsandbytes' 4-bit layers true on a processor.

With AVX-512 BF16, `Linear4bit` repacks its weight at its first forward in evaluation mode. A repacked layer passes no
gradient to its input, stores its scales rounded to bfloat16, and cannot repack shapes that its kernel does not divide.
"""

from collections.abc import Iterator
from typing import Any

KERNEL_ROWS = 32
"""Output features that the packed kernel takes at a time: `block_n` of bitsandbytes' packing."""


def layers_4bit(module: Any) -> Iterator[Any]:
    """The 4-bit layers of a module."""
    from bitsandbytes.nn import Linear4bit

    return (layer for layer in module.modules() if isinstance(layer, Linear4bit))


def is_packed_for_cpu(layer: Any) -> bool:
    """Whether a 4-bit layer has been repacked for inference."""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def leave_odd_shapes_unpacked(module: Any) -> None:
    """Forbid repacking where it would fail: its kernel wants 32 rows at a time and whole blocks along a row."""
    for layer in layers_4bit(module):
        state = layer.weight.quant_state
        rows, columns = state.shape
        if rows % KERNEL_ROWS or columns % state.blocksize:
            layer.support_avx512bf16_for_cpu = False


def keep_unpacked(module: Any) -> None:
    """Make a module fit for training: unpack every 4-bit layer, and keep it so through evaluations in between."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    for layer in layers_4bit(module):
        if is_packed_for_cpu(layer):
            layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)
        layer.support_avx512bf16_for_cpu = False


def dequantized(module: Any) -> Any:
    """The module with every quantized layer turned into a float32 one, fit to be saved."""
    import torch

    module = module.dequantize(dtype=torch.float32).float()
    # transformers would undo on saving what it did on loading, and reading packed weights cannot be undone.
    conversions = getattr(module, "_weight_conversions", None) or []
    module._weight_conversions = [c for c in conversions if not any(map(_is_of_bitsandbytes, _operations(c)))]
    return module


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def _is_of_bitsandbytes(operation: Any) -> bool:
    return type(operation).__module__.endswith("bitsandbytes")

"""Keeping bitsandbytes' layers true on a processor, and reading what is in them.

With AVX-512 BF16, `Linear4bit` repacks its weight at its first forward in evaluation mode. A repacked layer passes no
gradient to its input, stores its scales rounded to bfloat16, and cannot repack shapes that its kernel does not divide.
Its bytes are no weight that anything else could read: `weight_of` is how to read any linear layer, and what reads them
otherwise (DoRA, to take norms) gets layers that are kept unpacked.
"""

import copy
from collections.abc import Iterable, Iterator
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


def as_opened(module: Any) -> None:
    """Fit a module just loaded for use: note the bytes of its packed weights, and forbid repacking where it would fail.

    The kernel wants 32 rows at a time and whole blocks along a row.
    """
    for layer in module.modules():
        if is_packed(layer):
            layer.bytes_as_opened = bytes_in(tensors_of(layer))
            layer.register_forward_pre_hook(_scales_stay)
    for layer in layers_4bit(module):
        state = layer.weight.quant_state
        rows, columns = state.shape
        if rows % KERNEL_ROWS or columns % state.blocksize:
            layer.support_avx512bf16_for_cpu = False


def _scales_stay(layer: Any, args: Any) -> None:
    # To read an 8-bit weight on a processor PEFT's DoRA replaces it by one without scales, which the layer then takes.
    if getattr(layer.weight, "CB", None) is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def keep_unpacked(module: Any) -> None:
    """Make a module fit for training: unpack every 4-bit layer, and keep it so through evaluations in between."""
    for layer in layers_4bit(module):
        layer.weight.data, layer.weight.quant_state = _unpacked(layer)
        layer.support_avx512bf16_for_cpu = False


def _unpacked(layer: Any) -> tuple[Any, Any]:
    """Bytes and scales of a 4-bit layer as they were before it was repacked, but for scales rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    if not is_packed_for_cpu(layer):
        return layer.weight.data, layer.weight.quant_state
    state = copy.copy(layer.weight.quant_state)  # the inverse writes into the state that it is given
    scales = state.absmax  # (blocks of a row, rows)
    data, state = unpack(layer.weight.data, state)
    if not state.nested:  # it turns back only the scales that are quantized themselves
        state.absmax = scales.t().reshape(-1).float()
    return data, state


def is_packed(layer: Any) -> bool:
    """Whether bitsandbytes holds the weight of a layer; asked without importing it."""
    return any(c.__module__.startswith("bitsandbytes.") for c in type(layer).__mro__)


def weight_of(layer: Any) -> Any:
    """The dense weight `[outputs, inputs]` of a linear layer, however it is held, packed for a kernel or not."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weight = layer.weight
    if isinstance(layer, Linear4bit) and weight.quant_state is not None:
        return functional.dequantize_4bit(*_unpacked(layer))
    if isinstance(layer, Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data if scales is None else functional.int8_vectorwise_dequant(weight.data, scales)
    return weight.data


def tensors_of(layer: Any) -> Iterator[Any]:
    """Every tensor that a layer itself holds, those that bitsandbytes keeps beside its weight too."""
    yield from layer.parameters(recurse=False)
    yield from layer.buffers(recurse=False)
    # Not `layer.weight`: the layer that PEFT puts around another one answers with the weight of that one.
    weight = layer._parameters.get("weight")
    yield from _held_by(getattr(weight, "quant_state", None))
    yield from _held_by(vars(layer).get("state"))
    yield from _held_by(weight, ("CB", "SCB"))


def _held_by(holder: Any, names: Iterable[str] = ("absmax", "code", "offset", "CB", "SCB")) -> Iterator[Any]:
    import torch

    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    if getattr(holder, "state2", None) is not None:
        yield from _held_by(holder.state2)


def bytes_in(tensors: Iterable[Any]) -> int:
    """The memory of tensors, each piece of it once."""
    storages = (t.untyped_storage() for t in tensors if t.numel())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reads_weights(module: Any) -> bool:
    """Whether an adapter, as DoRA does for its norms, reads the weights of the layers under it when it computes."""
    adapters = module.peft_config.values()
    return any(a.peft_type.value != "LORA" or bool(getattr(a, "use_dora", False)) for a in adapters)


def dequantized(module: Any) -> Any:
    """The module with every quantized layer turned into a float32 one, fit to be saved."""
    import torch

    keep_unpacked(module)
    turned = [name for name, layer in module.named_modules() if is_turned(layer)]
    module = module.dequantize(dtype=torch.float32).float()
    for name in turned:
        module.set_submodule(name, _conv1d(module.get_submodule(name)))
    # transformers would undo on saving what it did on loading, and reading packed weights cannot be undone.
    conversions = getattr(module, "_weight_conversions", None) or []
    module._weight_conversions = [c for c in conversions if not any(map(_is_of_bitsandbytes, _operations(c)))]
    return module


def is_turned(layer: Any) -> bool:
    """Whether a quantized layer took the place of a `Conv1D`, whose files hold `[inputs, outputs]`."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", object), Conv1D)


def _conv1d(layer: Any) -> Any:
    """A linear layer as the `Conv1D` of the same product."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        turned = Conv1D(layer.out_features, layer.in_features)
    turned.weight = torch.nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)
    turned.bias = layer.bias
    return turned


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def _is_of_bitsandbytes(operation: Any) -> bool:
    return type(operation).__module__.endswith("bitsandbytes")

"""bitsandbytes layers on a processor: repacked only where that is safe, with weights that can be read.

With AVX-512 BF16, `Linear4bit` repacks its weight in the first forward pass in evaluation mode. A repacked layer
passes no gradient to its input, has its scales rounded to bfloat16, and fails for shapes that the kernel does not
divide. Nothing else can read the repacked bytes: `weight_of` reads any linear layer, and code that reads weights by
other means (DoRA, to take norms) gets layers that are kept unpacked.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Linear, Module
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

KERNEL_ROWS = 32
"""Output features that the packed kernel takes at a time: `block_n` of bitsandbytes' packing."""


def layers_4bit(module: Module) -> Iterator[Linear4bit]:
    """The 4-bit layers of a module; whoever has none need not wait two seconds for the library that makes them."""
    if "bitsandbytes" not in sys.modules:
        return iter(())
    from bitsandbytes.nn import Linear4bit

    return (layer for layer in module.modules() if isinstance(layer, Linear4bit))


def is_packed_for_cpu(layer: Linear4bit) -> bool:
    """True if a 4-bit layer has been repacked for inference."""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def as_opened(module: Module) -> None:
    """Prepare a loaded module: note the bytes of its packed weights, and forbid repacking where that would fail.

    The kernel takes 32 rows at a time, and whole blocks along a row.
    """
    for layer in module.modules():
        if is_packed(layer):
            layer.bytes_as_opened = bytes_in(tensors_of(layer))  # type: ignore[assignment]
            layer.register_forward_pre_hook(_scales_stay)
    for layer in layers_4bit(module):
        state = layer.weight.quant_state
        rows, columns = state.shape  # (outputs, inputs)
        if rows % KERNEL_ROWS or columns % state.blocksize:
            layer.support_avx512bf16_for_cpu = False


def _scales_stay(layer: Linear8bitLt, args: object) -> None:
    # To read an 8-bit weight on a processor, PEFT's DoRA replaces the weight by one without the scales of the layer.
    if getattr(layer.weight, "CB", None) is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def keep_unpacked(module: Module) -> None:
    """Make a module fit for training: unpack every 4-bit layer, and forbid repacking during evaluations."""
    for layer in layers_4bit(module):
        layer.weight.data, layer.weight.quant_state = _unpacked(layer)
        layer.support_avx512bf16_for_cpu = False


def stored_as(dtype: torch.dtype, module: Module) -> None:
    """Let 4-bit weights lie in memory as numbers of a float dtype, the same bytes: FSDP leaves bytes whole.

    A weight whose bytes are no whole numbers of the dtype stays as it is.
    """
    for layer in layers_4bit(module):
        if layer.weight.nbytes % dtype.itemsize == 0:
            layer.weight.data = layer.weight.data.reshape(-1).view(dtype).reshape(-1, 1)
            layer.quant_storage = layer.weight.quant_storage = dtype
            layer.quant_state = layer.weight.quant_state  # FSDP makes plain parameters, which the layer then dresses


def _unpacked(layer: Linear4bit) -> tuple[Tensor, QuantState]:
    """Bytes and scales of a 4-bit layer as they were before it was repacked, but for scales rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    if not is_packed_for_cpu(layer):
        return layer.weight.data, layer.weight.quant_state
    state = copy.copy(layer.weight.quant_state)  # `unpack` writes into the state
    scales = state.absmax  # (blocks of a row, rows)
    data, state = unpack(layer.weight.data, state)
    if not state.nested:  # `unpack` transposes only scales that are quantized themselves
        state.absmax = scales.t().reshape(-1).float()
    return data, state


def is_packed(layer: Module) -> bool:
    """True if bitsandbytes holds the weight of a layer; tells so without an import of bitsandbytes."""
    return any(c.__module__.startswith("bitsandbytes.") for c in type(layer).__mro__)


def weight_of(layer: Linear) -> Tensor:
    """The dense weight `[outputs, inputs]` of a linear layer, whether packed for a kernel or not."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weight: Params4bit = layer.weight
    dense: Tensor = weight.data
    if isinstance(layer, Linear4bit) and weight.quant_state is not None:
        dense = functional.dequantize_4bit(*_unpacked(layer))
    elif isinstance(layer, Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # (outputs,), float32
        dense = dense if scales is None else functional.int8_vectorwise_dequant(dense, scales)
    return dense


def tensors_of(layer: Module) -> Iterator[Tensor]:
    """Every tensor that a layer itself holds, and those that bitsandbytes keeps beside its weight."""
    yield from layer.parameters(recurse=False)
    yield from layer.buffers(recurse=False)
    # Not `layer.weight`: PEFT's layer around another layer answers with the weight of the inner layer.
    weight = layer._parameters.get("weight")
    yield from _held_by(getattr(weight, "quant_state", None))
    yield from _held_by(vars(layer).get("state"))
    yield from _held_by(weight, ("CB", "SCB"))


def _held_by(holder: object, names: Iterable[str] = ("absmax", "code", "offset", "CB", "SCB")) -> Iterator[Tensor]:
    import torch

    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    if (nested := getattr(holder, "state2", None)) is not None:
        yield from _held_by(nested)


def bytes_in(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind tensors; memory that several tensors share counts once."""
    storages = (t.untyped_storage() for t in tensors if t.numel())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reads_weights(module: PeftModel) -> bool:
    """True if an adapter reads the weights of the layers under it in the forward pass, as DoRA does for norms."""
    adapters = module.peft_config.values()
    return any(a.peft_type.value != "LORA" or bool(getattr(a, "use_dora", False)) for a in adapters)


def dequantized(module: PreTrainedModel) -> PreTrainedModel:
    """The module with every quantized layer turned into a float32 layer, ready to be saved."""
    for name, layer in bared(module).items():
        module.get_parameter(f"{name}.weight").data = as_in_files(layer)
    return module.float()


def bared(module: PreTrainedModel) -> dict[str, Module]:
    """Put a float32 layer, whose weight is without memory, in place of each packed one; the packed layers by name."""
    from llmq.matrix.packed_linear import PackedLinear

    keep_unpacked(module)
    packed = {n: layer for n, layer in module.named_modules() if is_packed(layer) or isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        module.set_submodule(name, _bare(layer))
    module.hf_quantizer.remove_quantization_config(module)
    # On saving, transformers undoes the conversions of loading; those that read packed weights cannot be undone.
    conversions = getattr(module, "_weight_conversions", None) or []
    module._weight_conversions = [c for c in conversions if not _reads_packed(c)]
    return packed


def as_in_files(layer: Module) -> Tensor:
    """The weight of a packed layer in float32, as files hold it: `[inputs, outputs]` for a `Conv1D`."""
    weight = weight_of(cast("Linear", layer)) if is_packed(layer) else cast("Tensor", layer.weight)
    return (weight.t().contiguous() if _is_conv1d(layer) else weight).float()


def _is_conv1d(layer: Module) -> bool:
    """True if a packed layer took the place of a `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", object), Conv1D)


def _bare(packed: Module) -> Module:
    """The float layer that computes the same product as a packed one, with a weight without memory."""
    import torch
    from transformers.pytorch_utils import Conv1D

    layer = cast("Linear", packed)
    inputs, outputs = layer.in_features, layer.out_features
    with torch.device("meta"):  # or random weights would be drawn first
        biased = layer.bias is not None
        bare = Conv1D(outputs, inputs) if _is_conv1d(layer) else torch.nn.Linear(inputs, outputs, biased)
    bare.weight = torch.nn.Parameter(nothing_like(bare.weight), requires_grad=False)
    bare.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.float(), requires_grad=False)
    return bare


def nothing_like(tensor: Tensor) -> Tensor:
    """A tensor of float32 zeros with the same shape that takes no memory."""
    import torch

    return torch.zeros(()).expand(tensor.shape)


def _reads_packed(conversion: WeightConverter) -> bool:
    operations = getattr(conversion, "operations", None) or []
    return any(type(operation).__module__.endswith("bitsandbytes") for operation in operations)

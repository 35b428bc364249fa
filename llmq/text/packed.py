"""A quantizer of transformers that opens GPTQ checkpoints with our own packed layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq import resident
from llmq.matrix import pack_quantized
from llmq.matrix.packed_linear import PackedLinear, PackQuantizedLinear
from llmq.text.linear_view import Experts, is_merging, unfuse
from llmq.text.names import module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

METHOD = "llmq_packed"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a GPTQ checkpoint, or a pack-quantized one, to be opened by llmq."""

    def __init__(self, **settings: object):
        self.quant_method = METHOD
        self.method = settings.pop("packed_by", "gptq")
        self.settings = {key: value for key, value in settings.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, object]:
        """The settings as the checkpoint's `config.json` holds them, under the method that packed it."""
        return {**self.settings, "quant_method": self.method}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts `PackedLinear` in place of every linear layer that the checkpoint holds packed."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] = (), **kwargs: object
    ) -> PreTrainedModel:
        stored_as = self.quantization_config.settings.get("checkpoint_format", "gptq")
        stored = _stored(checkpoint_files)
        layers = [key.rpartition(".")[0] for key in stored if key.endswith((".qweight", ".weight_packed"))]
        unfuse(model, module_names(model, layers).values())  # a packed expert is a layer of its own
        file_names = {name: key for key, name in module_names(model, layers).items()}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear | Conv1D) and name in file_names:
                shape, dtype = layer.weight.shape, layer.weight.dtype
                # Conv1D holds (inputs, outputs), Linear (outputs, inputs).
                inputs, outputs = shape if isinstance(layer, Conv1D) else shape[::-1]
                parts = {
                    part: stored[f"{file_names[name]}.{part}"]
                    for part in ("qweight", "scales", *pack_quantized.TENSORS)
                    if f"{file_names[name]}.{part}" in stored
                }
                bias = layer.bias is not None
                with torch.device("meta"):  # the files bring the memory
                    packed = (
                        _of_gptq(parts, inputs, outputs, bias, stored_as, dtype)
                        if "qweight" in parts
                        else PackQuantizedLinear(inputs, outputs, bias, parts, dtype)
                    )
                packed.source_cls = type(layer)
                packed._is_hf_initialized = True  # or transformers would fill the weight
                model.set_submodule(name, packed)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        for layer in packed_layers(model):
            stored = list(layer.buffers())
            layer.prepare()
            if layer.planes:  # the codes lie there now, and pages of the file would stay
                resident.forget(stored)
            del stored
        resident.trim()
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightConverter], model: PreTrainedModel
    ) -> list[WeightConverter]:
        """Without the conversions that would merge experts: experts with layers of their own are loaded one by one."""
        if any(isinstance(module, Experts) for module in model.modules()):
            return [c for c in weight_conversions if not is_merging(c)]
        return weight_conversions

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                dense.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)  # (outputs, inputs)
                dense.bias = layer.bias
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        """False: a packed model is copied as its checkpoint, never saved from memory."""
        return False

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through a packed layer to the layers before it."""
        return True


def packed_layers(model: torch.nn.Module) -> Iterator[PackedLinear]:
    return (module for module in model.modules() if isinstance(module, PackedLinear))


Shapes = dict[str, tuple[list[int], torch.dtype]]
DTYPES = {"I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _of_gptq(parts: Shapes, inputs: int, outputs: int, bias: bool, stored_as: str, dtype: torch.dtype) -> PackedLinear:
    bits = parts["qweight"][0][0] * 32 // inputs  # qweight (inputs * bits / 32, outputs)
    groups = parts["scales"][0][0]  # scales (groups, outputs)
    return PackedLinear(inputs, outputs, bias, bits, groups, stored_as, dtype)


def _stored(files: Iterable[str]) -> Shapes:
    """The shape and dtype of each tensor in the files."""
    held: Shapes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            slices = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118
            held |= {n: (part.get_shape(), DTYPES.get(part.get_dtype(), torch.float32)) for n, part in slices}
    return held

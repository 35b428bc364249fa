"""Opening a GPTQ checkpoint through transformers with our own packed layers."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq import trust
from llmq.errors import UserError
from llmq.models.formats import check_code, quantization
from llmq.models.linear_view import Experts, is_merging, unfuse
from llmq.models.names import module_names
from llmq.quantize.gptq_format import ZERO_OFFSETS
from llmq.quantize.gptq_linear import PackedLinear

METHOD = "llmq_packed"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a GPTQ checkpoint, to be opened by llmq."""

    def __init__(self, **settings: Any):
        self.quant_method: Any = METHOD
        self.settings = {key: value for key, value in settings.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {**self.settings, "quant_method": "gptq"}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `PackedLinear` in place of every linear layer that the checkpoint holds packed."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = (), **kwargs: Any) -> Any:
        stored_as = self.quantization_config.settings.get("checkpoint_format", "gptq")
        shapes = stored_shapes(checkpoint_files)
        layers = [key.removesuffix(".qweight") for key in shapes if key.endswith(".qweight")]
        unfuse(model, module_names(model, layers).values())
        file_names = {its: file for file, its in module_names(model, layers).items()}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear | Conv1D) and name in file_names:
                shape, dtype = layer.weight.shape, layer.weight.dtype
                inputs, outputs = shape if isinstance(layer, Conv1D) else shape[::-1]
                bits = shapes[f"{file_names[name]}.qweight"][0] * 32 // inputs
                groups = shapes[f"{file_names[name]}.scales"][0]
                with torch.device("meta"):
                    packed = PackedLinear(inputs, outputs, layer.bias is not None, bits, groups, stored_as, dtype)
                packed.source_cls = type(layer)
                packed._is_hf_initialized = True  # or transformers would fill what it takes for a weight
                model.set_submodule(name, packed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in packed_layers(model):
            layer.prepare()
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts that are layers of their own are loaded one by one, as the files hold them."""
        if any(isinstance(module, Experts) for module in model.modules()):
            return [c for c in weight_conversions if not is_merging(c)]
        return weight_conversions

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                dense.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
                dense.bias = layer.bias
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        """Not from here: the checkpoint itself is what to copy."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through a packed layer to what lies before it."""
        return True


def packed_layers(model: Any) -> Iterator[PackedLinear]:
    """The packed layers of a model."""
    return (module for module in model.modules() if isinstance(module, PackedLinear))


def stored_shapes(files: Iterable[str]) -> dict[str, list[int]]:
    """Name -> shape of every tensor in safetensors files."""
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            shapes.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    return shapes


def config_to_open(folder: Path, device: str) -> Any:
    """The configuration of a GPTQ folder that makes transformers open it with our layers; None for any other folder.

    On a GPU where GPTQModel is installed its kernels are the faster ones, and transformers opens the folder by itself.
    Raises `UserError` for a format of packing that is not read here.
    """
    check_code(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
    settings = quantization(folder) or {}
    if settings.get("quant_method") != "gptq":
        return None
    if device != "cpu" and importlib.util.find_spec("gptqmodel"):
        return None
    stored = settings.get("checkpoint_format", "gptq")
    if stored not in ZERO_OFFSETS:
        raise UserError(f"{str(folder)!r} is packed as {stored!r}; what can be opened is {' and '.join(ZERO_OFFSETS)}")
    config.quantization_config = {**settings, "quant_method": METHOD}
    return config

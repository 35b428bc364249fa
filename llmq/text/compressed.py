"""A GPTQ checkpoint written again in the pack-quantized format of compressed-tensors, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmq.errors import UserError
from llmq.files import write_json
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import INDEX, OTHER_NAME, opened, safetensors_of
from llmq.matrix import gptq_format, pack_quantized
from llmq.text.blockwise import write
from llmq.text.formats import COMPRESSED, PACK_QUANTIZED, PACKED_BITS, quantization
from llmq.text.names import module_names
from llmq.text.opening import stored_as, without_weights
from llmq.text.skeleton import copy_files

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.matrix.grid import Quantized
    from llmq.text.packed_tensors import Stored


class Scheme(NamedTuple):
    """The settings that layers of one config group share; `group_size` is None where a whole row shares a scale."""

    bits: int
    group_size: int | None
    symmetric: bool

    def described(self, targets: list[str]) -> dict[str, object]:
        """The config group of layers by name."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "strategy": "group" if self.group_size else "channel",
            "dynamic": False,
        }
        nothing = {"input_activations": None, "output_activations": None}
        return {"targets": targets, "weights": weights, **nothing, "format": PACK_QUANTIZED}


def write_compressed(source: Path, folder: Path) -> dict[str, Scheme | None]:
    """Write the GPTQ checkpoint in `source` to `folder` as pack-quantized.

    Returns the scheme of each linear layer by name, None for one that is not packed.

    Raises `UserError` for another packing, for bits and orders of inputs that the format has no place for, and for
    layers that are no linear layers of transformers.
    """
    settings = quantization(source) or {}
    if settings.get("quant_method") != "gptq":
        raise UserError(
            f"{str(source)!r} is packed by {settings.get('quant_method')}; what quantize.gptq, rtn and awq write is "
            "exported"
        )
    form = str(settings.get("checkpoint_format", "gptq"))
    held = stored_as(safetensors_of(source))
    layers = [name.removesuffix(".qweight") for name in held if name.endswith(".qweight")]
    names = _linear_names(source, layers)
    schemes: dict[str, Scheme] = {}
    weight_map: dict[str, str] = {}
    for file in safetensors_of(source):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _converted(file, held, form, schemes):
            tensors[name], weight_map[name] = tensor, file.name
        write(tensors, folder / file.name)
    if len(set(weight_map.values())) > 1:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return _describe(source, folder, {names[layer]: scheme for layer, scheme in schemes.items()})


def _linear_names(source: Path, layers: list[str]) -> dict[str, str]:
    """The name in transformers of each packed layer. Raises `UserError` for one that is no linear layer there."""
    import torch

    network = without_weights(source)
    linear = {name for name, module in network.named_modules() if type(module) is torch.nn.Linear}
    names = module_names(network, layers)
    if odd := sorted(layer for layer, name in names.items() if name not in linear):
        raise UserError(
            f"{odd[0]} of {network.config.model_type} is no linear layer of transformers, but an expert of many "
            "or a turned matrix, and the pack-quantized format has no place for it; export it as gguf, or leave it "
            "out of the quantization by modules: {…: skip}"
        )
    return names


def _converted(
    file: Path, held: Mapping[str, Stored], form: str, schemes: dict[str, Scheme]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file for the new one; the parts of a packed layer come with its `qweight`."""
    with opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            layer, _, leaf = name.rpartition(".")
            if f"{layer}.qweight" not in held or leaf not in gptq_format.TENSORS:
                yield name, tensors.get_tensor(name)
            elif leaf == "qweight":
                made = _quantized(layer, held, form)
                schemes[layer] = _scheme(layer, made)
                parts = pack_quantized.to_tensors(made, schemes[layer].symmetric)
                yield from ((f"{layer}.{part}", tensor) for part, tensor in parts.items())


def _quantized(layer: str, held: Mapping[str, Stored], form: str) -> Quantized:
    import torch

    parts = {}
    for part in gptq_format.TENSORS:
        if f"{layer}.{part}" in held:
            with opened(held[f"{layer}.{part}"].file) as tensors:
                parts[part] = tensors.get_tensor(f"{layer}.{part}")
    outputs, groups = parts["scales"].shape[::-1]
    bits = parts["qzeros"].shape[1] * 32 // outputs
    inputs = parts["qweight"].shape[0] * 32 // bits
    parts.setdefault("g_idx", torch.arange(inputs, dtype=torch.int32) // (inputs // groups))
    return gptq_format.from_tensors(parts, bits, form)


def _scheme(layer: str, made: Quantized) -> Scheme:
    if made.bits not in PACKED_BITS:
        raise UserError(
            f"{layer} has {made.bits} bits, and vLLM reads pack-quantized layers of 4 and 8; quantize it with bits: 4"
        )
    if not pack_quantized.in_order(made):
        raise UserError(
            f"{layer} has groups in the order of its activations, which compressed-tensors reads no longer; quantize "
            "with static_groups: true, or desc_act: false"
        )
    groups = len(made.scales)
    return Scheme(made.bits, len(made.codes) // groups if groups > 1 else None, pack_quantized.is_symmetric(made))


def _describe(source: Path, folder: Path, schemes: Mapping[str, Scheme]) -> dict[str, Scheme | None]:
    """Write the configuration, and the files beside the weights. Returns the scheme of each linear layer."""
    import torch

    kinds: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        kinds.setdefault(scheme, []).append(name)
    network = without_weights(source)
    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    # The kind of layer where all share one scheme, else names.
    groups = {
        f"group_{i}": scheme.described(["Linear"] if len(kinds) == 1 else names)
        for i, (scheme, names) in enumerate(kinds.items())
    }
    told = {
        "quant_method": COMPRESSED,
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in schemes],
        "kv_cache_scheme": None,
    }
    config = read_json_object(source / "config.json")
    copy_files(source, folder)
    kept = {key: value for key, value in config.items() if key != OTHER_NAME}
    write_json(folder / "config.json", {**kept, "quantization_config": told})
    return {name: schemes.get(name) for name in linear}

"""The configuration of a model folder: the method that packed the weights, and the kind of network."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import at_home
from llmq.guarded import weights
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import safetensors_of

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
"""The files of a model folder that are read."""
READ = ("gptq", "bitsandbytes")
"""Methods of quantization whose folders are opened."""
COMPRESSED, PACK_QUANTIZED = "compressed-tensors", "pack-quantized"
PACKED_BITS = (4, 8)
"""Bits of pack-quantized layers that vLLM reads."""
"""The method whose folders are opened in one format alone, and that format."""
PACKS_THAT = "; quantize.{step} packs that"  # cures: ends of the message that refuses a folder
DEQUANTIZES = ", or let transformers make floats of it: {config}(dequantize=True), then save_pretrained"
ANY_OTHER = ", or open it with its own library and save it in bfloat16"
OTHERS = {
    "aqlm": ("AQLM", PACKS_THAT.format(step="gptq {bits: 2}")),
    "auto-round": ("AutoRound", ", or export it from AutoRound as format='auto_gptq', which is read here"),
    "awq": ("AWQ", PACKS_THAT.format(step="gptq {bits: 4, group_size: 128}")),
    "bitnet": ("BitNet", ", which its makers publish beside it as ...-bf16"),
    "compressed-tensors": ("compressed-tensors", DEQUANTIZES.format(config="CompressedTensorsConfig")),
    "compression_config": ("compressed-tensors", ANY_OTHER),  # a key that transformers does not read
    "fp8": ("fine-grained FP8", DEQUANTIZES.format(config="FineGrainedFP8Config")),
    "hqq": ("HQQ", PACKS_THAT.format(step="rtn {bits: 4, mse: true}")),
    "mxfp4": ("MXFP4", DEQUANTIZES.format(config="Mxfp4Config")),
    "quanto": ("Quanto", PACKS_THAT.format(step="rtn {bits: 8}")),
    "torchao": ("torchao", PACKS_THAT.format(step="rtn {bits: 4}")),
}
"""Methods whose folders are not opened: the name that their makers use, and a cure besides the float model."""
BEYOND = ("kv_cache_scheme", "sparsity_config", "transform_config")
"""Keys of compressed-tensors for what is not read here."""
KEYS = ("quantization_config", "compression_config")
"""The keys of a configuration for the settings of packed weights; compressed-tensors before 0.6 wrote the second."""

OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""The files in which AutoGPTQ and AutoAWQ kept these settings before transformers read them, and the method of each."""


def is_hub_id(name: str) -> bool:
    """True for weights named as a repository on the hub that are no local folder or file."""
    local = name.endswith(".gguf") or at_home(name).exists()
    return not local and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))  # owner/name


def quantization(folder: Path) -> dict[str, object] | None:
    """The settings of packed weights in a folder, or None. Older GPTQ and AWQ folders keep them in a separate file.

    Raises `UserError` for a method that is not read here.
    """
    said = packed_as(folder)
    if said or not any(name.endswith(".qweight") for file in safetensors_of(folder) for name in weights.header(file)):
        return said
    for name, method in OLDER.items():
        if (folder / name).is_file():
            return _with_method(folder, {"quant_method": method, **read_json_object(folder / name)})
    raise UserError(f"{str(folder)!r} holds packed layers (*.qweight), and none of its files states the number of bits")


def grid_of(folder: Path) -> dict[str, object]:
    """The bits, group size and symmetry of the grid of a folder, as settings; empty for one that no such grid packs."""
    settings = quantization(folder) or {}
    if settings.get("quant_method") != "gptq":
        return {}
    return {name: value for name, value in settings.items() if name in ("bits", "group_size", "sym")}


def packed_as(folder: Path) -> dict[str, object] | None:
    """The settings of packed weights in the configuration of a folder, or None; needs no weights.

    As in transformers, the settings are those of the whole model, or of the language model within a model that sees
    images. Raises `UserError` for a method that is not read here.
    """
    file = folder / "config.json"
    config = read_json_object(file)
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in KEYS:
            said = place.get(key)
            if said and not isinstance(said, dict):
                raise UserError(f"{str(file)!r}: {key} is no object")
            if said:
                # transformers reads such settings without a method as those of bitsandbytes.
                implied = "bitsandbytes" if any(k.startswith(("load_in", "bnb_")) for k in said) else None
                method = key if key == KEYS[1] else said.get("quant_method") or implied
                return _with_method(folder, {**said, "quant_method": method})
    return None


def _with_method(folder: Path, said: dict[str, object]) -> dict[str, object]:
    """The same settings. Raises `UserError` if their method is not read here."""
    method = said["quant_method"]
    if not method:
        raise UserError(f"{str(folder)!r} is packed, and no 'quant_method' in its {KEYS[0]} says how")
    if method not in READ and not (method == COMPRESSED and is_pack_quantized(said)):
        name, cure = OTHERS.get(str(method), (repr(method), ANY_OTHER))
        raise UserError(
            f"{str(folder)!r} is packed by {name}, which is not read here "
            f"({', '.join(READ)} and {PACK_QUANTIZED} are); name the float model that it was made of{cure}"
        )
    return said


def is_pack_quantized(said: Mapping[str, object]) -> bool:
    """True if settings of compressed-tensors say that integers of weights are packed, and nothing else is quantized."""
    groups = said.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if said.get("format") != PACK_QUANTIZED or not schemes or any(said.get(key) for key in BEYOND):
        return False
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("dynamic"):
            return False
        if scheme.get("format") not in (None, PACK_QUANTIZED):
            return False
        if scheme.get("input_activations") or scheme.get("output_activations"):
            return False
    return True


def check_code(folder: Path) -> None:
    """Raise `UserError` for a folder that asks to run code, unless code of that kind is trusted.

    The code is Python in the folder, or a kernel that transformers would download from the hub.
    """
    file = folder / "config.json"
    said = read_json_object(file) if file.is_file() else {}
    kind = said.get("model_type")
    if said.get("auto_map") and not _is_known(kind):  # else transformers' own class opens the folder
        trust.need_remote_code(f"{str(folder)!r} ({kind}) brings code of its own")
    for key, kernel in _kernels(said):
        trust.need_remote_code(f"{str(file)!r}: {key} {kernel!r} asks for native code of the hub")


def _is_known(kind: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES if isinstance(kind, str) else False


def _kernels(said: object) -> Iterator[tuple[str, str]]:
    """The implementations in a configuration that are named as a repository: `owner/name`."""
    for key, value in said.items() if isinstance(said, dict) else ():
        named = value.values() if isinstance(value, dict) else [value]
        if str(key).endswith("_implementation"):  # such as attn_implementation
            yield from ((key, name) for name in named if isinstance(name, str) and "/" in name)
        else:
            yield from _kernels(value)


def check_network(folder: Path) -> None:
    """Raise `UserError` for a configuration that transformers does not know, or that is of no causal language model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    said = read_json_object(folder / "config.json")
    kind, own = said.get("model_type"), said.get("auto_map")
    if own and trust.remote_code():  # the checks below are of transformers' own classes
        return
    check_code(folder)
    if not _is_known(kind):
        fault = (
            f"is of model_type {kind!r}, which transformers does not know"
            if kind is not None
            else "has no 'model_type'"
        )
        raise UserError(f"{str(folder / 'config.json')!r} {fault}{did_you_mean(str(kind), CONFIG_MAPPING_NAMES)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(folder / 'config.json')!r} does not describe a {kind}: {reason}") from None
    if config.is_encoder_decoder:  # T5 and its kin
        raise UserError(f"{str(folder)!r} ({kind}) is an encoder-decoder; causal_lm opens decoders alone")
    # BERT and its kin have a causal class with the same weights, which sees later tokens unless `is_decoder` is set.
    both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or both_ways:
        raise UserError(f"{str(folder)!r} ({kind}) is no causal language model")

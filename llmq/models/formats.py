"""What a model folder says of itself: how it is packed, and what kind of network it describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import safetensors_of
from llmq.guarded import json_files, safetensors_files

READ = ("gptq", "bitsandbytes")
"""Methods of quantization whose folders are opened."""
PACKS_THAT = "; quantize.{step} packs that"
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
"""Methods whose folders are not opened: what their makers call them, and what helps besides the float model."""
KEYS = ("quantization_config", "compression_config")
"""What a configuration calls the settings of packed weights; the second compressed-tensors wrote before 0.6."""


def quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights of a folder are packed, or None; GPTQ's older folders say so in a file of their own.

    Raises `UserError` for a method that is not read here.
    """
    said = packed_as(folder)
    if said or not any(
        name.endswith(".qweight") for file in safetensors_of(folder) for name in safetensors_files.header(file)
    ):
        return said
    older = folder / "quantize_config.json"
    if not older.is_file():
        raise UserError(f"{str(folder)!r} holds packed layers (*.qweight) and says nowhere with how many bits")
    return _with_method(folder, {"quant_method": "gptq", **json_files.read_object(older)})


def packed_as(folder: Path) -> dict[str, Any] | None:
    """What the configuration of a folder says of packed weights, or None; needs no weights.

    As transformers reads it: for the whole model, or within one that sees images for its language model. Raises
    `UserError` for a method that is not read here.
    """
    file = folder / "config.json"
    config = json_files.read_object(file)
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in KEYS:
            said = place.get(key)
            if said and not isinstance(said, dict):
                raise UserError(f"{str(file)!r}: {key} is no object")
            if said:
                implied = "bitsandbytes" if any(k.startswith(("load_in", "bnb_")) for k in said) else None
                method = key if key == KEYS[1] else said.get("quant_method") or implied
                return _with_method(folder, {**said, "quant_method": method})
    return None


def _with_method(folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """These settings, if their method is read here."""
    method = said["quant_method"]
    if not method:
        raise UserError(f"{str(folder)!r} is packed, and no 'quant_method' in its {KEYS[0]} says how")
    if method not in READ:
        name, cure = OTHERS.get(str(method), (repr(method), ANY_OTHER))
        raise UserError(
            f"{str(folder)!r} is packed by {name}, which is not read here ({' and '.join(READ)} are); "
            f"name the float model that it was made of{cure}"
        )
    return said


def check_code(folder: Path) -> None:
    """Raise `UserError` for a folder that cannot be opened without running what it brings, where that is not trusted.

    Besides Python of its own that is a kernel, which transformers would bring from the hub.
    """
    file = folder / "config.json"
    said = json_files.read_object(file) if file.is_file() else {}
    kind = said.get("model_type")
    if said.get("auto_map") and not _is_known(kind):
        trust.need_remote_code(f"{str(folder)!r} ({kind}) brings code of its own")
    for key, kernel in _kernels(said):
        trust.need_remote_code(f"{str(file)!r}: {key} {kernel!r} asks for native code of the hub")


def _is_known(kind: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES if isinstance(kind, str) else False


def _kernels(said: Any) -> Iterator[tuple[str, str]]:
    """What a configuration asks to compute with that is named as a repository: `owner/name`."""
    for key, value in said.items() if isinstance(said, dict) else ():
        named = value.values() if isinstance(value, dict) else [value]
        if str(key).endswith("_implementation"):
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

    said = json_files.read_object(folder / "config.json")
    kind, own = said.get("model_type"), said.get("auto_map")
    if own and trust.remote_code():
        return
    check_code(folder)
    if not _is_known(kind):
        missing = (
            "has no 'model_type'" if kind is None else f"is of model_type {kind!r}, which transformers does not know"
        )
        raise UserError(f"{str(folder / 'config.json')!r} {missing}{did_you_mean(str(kind), CONFIG_MAPPING_NAMES)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(folder / 'config.json')!r} does not describe a {kind}: {reason}") from None
    if config.is_encoder_decoder:
        raise UserError(f"{str(folder)!r} ({kind}) is an encoder-decoder; causal_lm opens decoders alone")
    # BERT and its kin have a causal class with the same weights, which sees what comes after unless told otherwise.
    both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or both_ways:
        raise UserError(f"{str(folder)!r} ({kind}) is no causal language model")

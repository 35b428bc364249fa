"""What a model folder says of itself: how it is packed, and what kind of network it describes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import safetensors_of

READ = ("gptq", "bitsandbytes")
"""Methods of quantization whose folders are opened."""
POSITIONS = "max_position_embeddings"


def quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights of a folder are packed, or None; GPTQ's older folders say so in a file of its own.

    Raises `UserError` for a method that is not read here.
    """
    said = read_object(folder / "config.json").get("quantization_config")
    older = folder / "quantize_config.json"
    if not said and older.is_file() and _holds(folder, ".qweight"):
        said = {"quant_method": "gptq", **read_object(older)}
    if not said:
        if _holds(folder, ".qweight"):
            raise UserError(f"{str(folder)!r} holds packed layers (*.qweight) and says nowhere with how many bits")
        return None
    if not isinstance(said, dict):
        raise UserError(f"{str(folder / 'config.json')!r}: quantization_config is no object")
    method = said.get("quant_method") or (
        "bitsandbytes" if any(k.startswith(("load_in", "bnb_")) for k in said) else None
    )
    if method not in READ:
        raise UserError(
            f"{str(folder)!r} is packed by {method!r}, which is not read here ({' and '.join(READ)} are); "
            "name the float model that it was made of, or open it with its own library and save it in bfloat16"
        )
    return {**said, "quant_method": method}


def check_code(folder: Path) -> None:
    """Raise `UserError` for a folder that cannot be opened without running what it brings, where that is not trusted.

    Besides Python of its own that is a kernel, which transformers would bring from the hub.
    """
    file = folder / "config.json"
    said = read_object(file) if file.is_file() else {}
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

    said = read_object(folder / "config.json")
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


def check_length(folder: Path, length: int) -> None:
    """Raise `UserError` for more tokens than a model has positions for; nothing is refused where it states no limit."""
    said = read_object(folder / "config.json")
    nested = said.get("text_config")
    positions = (nested if isinstance(nested, dict) else said).get(POSITIONS) or said.get("n_positions")
    if isinstance(positions, int) and positions > 0 and length > positions:
        raise UserError(f"{length} tokens: the model has {positions} positions; that many tokens at most")


def check_vocabulary(module: Any, tokenizer: Any, folder: Path) -> None:
    """Raise `UserError` for a tokenizer that makes tokens for which the model has no embedding."""
    rows = len(module.get_input_embeddings().weight)  # an adapter's layer in its place has a weight too
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        more = sorted(name for name, i in tokenizer.get_vocab().items() if i >= rows)
        raise UserError(
            f"{str(folder)!r}: the tokenizer has {highest + 1} tokens and the model {rows} embeddings, none for "
            f"{more[0]!r}; resize the embeddings of the model, or take the tokenizer that belongs to it"
        )


def _holds(folder: Path, ending: str) -> bool:
    from safetensors import safe_open

    for file in safetensors_of(folder):
        with safe_open(file, "np") as opened:
            if any(name.endswith(ending) for name in opened.keys()):  # noqa: SIM118
                return True
    return False


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises `UserError` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{str(file)!r} holds no JSON object")
    return found

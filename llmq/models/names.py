"""What transformers calls the layers that files hold under other names."""

from collections.abc import Iterable
from typing import Any

from llmq.quantize.gptq_format import TENSORS as PACKED


def module_names(module: Any, layers: Iterable[str]) -> dict[str, str]:
    """What a transformers model calls the layers of a file."""
    names = tensor_names(module, [f"{layer}.weight" for layer in layers])
    return {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in names.items()}


def tensor_names(module: Any, keys: Iterable[str]) -> dict[str, str]:
    """What a transformers model calls the tensors of a file: it renames what older files hold, and adds its prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(module) if isinstance(r, WeightRenaming)]
    known = dict(module.state_dict())

    def name_of(key: str) -> str:
        owner, _, leaf = key.rpartition(".")
        if leaf not in PACKED:
            return str(rename_source_key(key, renamings, [], module.base_model_prefix, known)[0])
        return f"{name_of(f'{owner}.weight').removesuffix('.weight')}.{leaf}"

    return {key: name_of(key) for key in keys}

"""Names of tensors in files and in modules: renamed tensors, and tied ones, where one tensor is two parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.guarded.weights import safetensors_of
from llmq.matrix import gptq_format, pack_quantized

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

PACKED = (*gptq_format.TENSORS, *pack_quantized.TENSORS)


def module_names(module: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """The name of each layer in the files -> the name of that layer in a transformers model."""
    names = tensor_names(module, [f"{layer}.weight" for layer in layers])  # transformers renames parameters, not layers
    return {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in names.items()}


def tensor_names(module: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The name of each tensor in the files -> the name of that tensor in a transformers model.

    transformers renames the tensors of older files and adds the prefix of the base model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(module) if isinstance(r, WeightRenaming)]
    known = dict(module.state_dict())  # tells where the prefix belongs

    def name_of(key: str) -> str:
        owner, _, leaf = key.rpartition(".")
        if leaf not in PACKED:
            return str(rename_source_key(key, renamings, [], module.base_model_prefix, known)[0])
        # transformers has no names for packed parts: they stand beside the weight.
        return f"{name_of(f'{owner}.weight').removesuffix('.weight')}.{leaf}"

    return {key: name_of(key) for key in keys}


def is_end(name: str, ends: Iterable[str]) -> bool:
    """True if the last parts of a name are among `ends`, as PEFT matches modules."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def stored(folder: Path, module: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """File and key of every tensor in a folder, by the name of the tensor in `module`."""
    from safetensors import safe_open

    files = {}
    for file in safetensors_of(folder):
        with safe_open(file, "pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    names = tensor_names(module, files)
    return {names[key]: (file, key) for key, file in files.items()}


def tied(module: PreTrainedModel, stored: Container[str]) -> dict[str, str]:
    """Each tensor that the files leave out -> the stored tensor tied to it; `stored` has the names of the module.

    Two matrices that are both stored stay two, although the configuration calls them tied: transformers opens them so.
    """
    pairs = module.get_expanded_tied_weights_keys(all_submodels=True).items()
    return {
        **{target: source for target, source in pairs if target not in stored and source in stored},
        **{source: target for target, source in pairs if source not in stored and target in stored},
    }


def untie(module: PreTrainedModel) -> dict[str, str]:
    """Give every tied tensor of an open module memory of its own, so that one can change alone; returns the pairs."""
    import torch

    pairs: dict[str, str] = module.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in pairs.items():
        if _of(module, target).data_ptr() == _of(module, source).data_ptr():
            own = torch.nn.Parameter(_of(module, target).detach().clone(), requires_grad=False)
            _set(module, target, own)
    return pairs


def save(
    module: PreTrainedModel, folder: Path, pairs: Mapping[str, str] | None = None, but: tuple[str, ...] = ()
) -> None:
    """Write an open language model: equal `pairs` tied, unequal ones stored apart, as the configuration then says.

    Tensors whose names begin with one of `but` are left out.
    """
    import torch

    pairs = module.get_expanded_tied_weights_keys(all_submodels=True) if pairs is None else pairs
    # A step may have changed one tensor of a pair alone.
    equal = {t: s for t, s in pairs.items() if torch.equal(_of(module, t), _of(module, s))}
    for target, source in equal.items():
        _set(module, target, _of(module, source))
    if pairs:
        # The text model within a larger model has a configuration of its own.
        for config in {id(c): c for c in (module.config, module.config.get_text_config())}.values():
            config.tie_word_embeddings = len(equal) == len(pairs)
        module.all_tied_weights_keys = equal  # tells save_pretrained which name of a shared tensor to drop
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(but)}
    module.save_pretrained(folder, state_dict=state)


def untied(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration, as JSON, of the same model with head and embeddings as two matrices."""
    nested = config.get("text_config")
    inner = {"text_config": untied(nested)} if isinstance(nested, dict) else {}
    return {**config, "tie_word_embeddings": False, **inner}


def _of(module: PreTrainedModel, name: str) -> Tensor:
    tensor: Tensor = module.get_parameter_or_buffer(name)
    return tensor


def _set(module: Module, name: str, parameter: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)

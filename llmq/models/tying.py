"""Which matrices of a language model are one: what its files hold decides, whatever its configuration says."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any


def tied(module: Any, stored: Container[str]) -> dict[str, str]:
    """Tensor that the files leave out -> the stored one that stands for it; `stored` has a module's names for them.

    Two matrices that are both stored are two, though the configuration may call them tied: so transformers opens them.
    """
    pairs = module.get_expanded_tied_weights_keys(all_submodels=True).items()
    return {
        **{target: source for target, source in pairs if target not in stored and source in stored},
        **{source: target for target, source in pairs if source not in stored and target in stored},
    }


def untie(module: Any) -> dict[str, str]:
    """Give every tied tensor of an open module memory of its own, so that one can change alone; the pairs that were."""
    import torch

    pairs: dict[str, str] = module.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in pairs.items():
        if _of(module, target).data_ptr() == _of(module, source).data_ptr():
            own = torch.nn.Parameter(_of(module, target).detach().clone(), requires_grad=False)
            _set(module, target, own)
    return pairs


def save(module: Any, folder: Path, pairs: Mapping[str, str] | None = None) -> None:
    """Write an open language model. Of `pairs` that may be tied, equal ones are; others are stored and called two."""
    import torch

    pairs = module.get_expanded_tied_weights_keys(all_submodels=True) if pairs is None else pairs
    equal = {t: s for t, s in pairs.items() if torch.equal(_of(module, t), _of(module, s))}
    for target, source in equal.items():
        _set(module, target, _of(module, source))
    if pairs:
        for config in {id(c): c for c in (module.config, module.config.get_text_config())}.values():
            config.tie_word_embeddings = len(equal) == len(pairs)
        module.all_tied_weights_keys = equal
    module.save_pretrained(folder)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, as its file has it, of a model whose head and embeddings are two matrices."""
    changed = {**config, "tie_word_embeddings": False}
    nested = config.get("text_config")
    return {**changed, "text_config": untied(nested)} if isinstance(nested, dict) else changed


def _of(module: Any, name: str) -> Any:
    return module.get_parameter_or_buffer(name)


def _set(module: Any, name: str, parameter: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)

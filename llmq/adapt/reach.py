"""Which weights of a model an adapter reaches: linear layers, and experts that are one tensor a block."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from llmq.models.skeleton import blocks_of

SHOWN = 0.005
"""Kinds of modules that hold less of the weights are not named."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""How configurations call the number of experts of a block."""


def expert_stacks(module: Any) -> list[str]:
    """The parameters `[experts, …, …]` that hold all experts of a block in one tensor, as `target_parameters` of PEFT.

    PEFT's `all-linear` knows those of a few architectures, by these names. Each is the end of a name, as short as it
    can be and mean no other parameter.
    """
    counts = {getattr(module.config.get_text_config(), key, None) for key in EXPERTS}
    stacks = {
        f"{name}.{leaf}"
        for name, layer in module.named_modules()
        if not type(layer).__module__.startswith("torch.nn.")
        for leaf, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim == 3 and len(parameter) in counts
    }
    others = [f".{name}" for name, _ in module.named_parameters() if name not in stacks]
    ends = (_ends(name) for name in stacks)
    return sorted({next(e for e in its if not any(o.endswith(f".{e}") for o in others)) for its in ends})


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-i:]) for i in range(1, len(parts) + 1))


def gates(module: Any) -> list[str]:
    """Linear layers of a class that makes something else of the product (Llama 4's router: a tuple), by name."""
    import torch

    def is_product(layer: Any) -> bool:
        with torch.no_grad():
            made = layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
        return isinstance(made, torch.Tensor) and made.shape == (1, layer.out_features)

    linear = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear))
    own = [(n, layer) for n, layer in linear if type(layer).__module__.startswith("transformers.models.")]
    return [name for name, layer in own if not is_product(layer)]


def weights_of(module: Any) -> dict[str, tuple[int, str]]:
    """How many weights each matrix in the blocks has, packed or not, and in what kind of module; by name."""
    found = {}
    for block in blocks_of(module):
        for name, layer in module.get_submodule(block).named_modules(prefix=block):
            kind = type(layer).__name__
            if hasattr(layer, "in_features"):
                found[name] = layer.in_features * layer.out_features, kind
            else:
                matrices = ((leaf, p) for leaf, p in layer.named_parameters(recurse=False) if p.ndim > 1)
                found |= {f"{name}.{leaf}": (p.numel(), kind) for leaf, p in matrices}
    return found


def reached(adapted: Any, weights: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """Notes on an adapted model: trained parameters, and the share of the `weights` of its blocks that they change.

    `left_out` has the shares of the largest kinds of modules that keep theirs.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    changed = set()
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            own = name.replace(".base_layer", "")  # of two parameters of one module each has a layer around the other
            changed.add(f"{own}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else own)
    total = sum(count for count, _ in weights.values())
    left: Counter[str] = Counter()
    for name, (count, kind) in weights.items():
        owners = name.split(".")
        if not any(".".join(owners[:i]) in changed for i in range(len(owners) + 1)):
            left[kind] += count
    return {
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "reached_share": round(1 - left.total() / total, 4),
        "left_out": {kind: round(count / total, 4) for kind, count in left.most_common(3) if count > SHOWN * total},
    }


def sentence(notes: dict[str, Any]) -> str:
    """The notes in one line."""
    left = ", ".join(f"{kind} {share:.1%}" for kind, share in notes["left_out"].items())
    share = f"the adapter reaches {notes['reached_share']:.1%} of the weights of the blocks"
    return share + (f"; left as they are: {left}" if left else "")

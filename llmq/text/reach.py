"""The weights of a model that an adapter reaches: linear layers, and experts that are one tensor a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypedDict

from llmq.errors import UserError, did_you_mean
from llmq.text.linear_view import blocks_of
from llmq.text.names import is_end

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Linear
    from transformers import PreTrainedModel

SHOWN = 0.005
"""The least share of the weights at which a kind of module is named."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations give to the number of experts of a block."""


class Reach(TypedDict):
    """Notes on an adapted model."""

    parameters: int
    """The number of parameters that are trained."""
    reached_share: float
    """The share of the weights of the blocks that the adapter changes."""
    left_out: dict[str, float]
    """The shares of the largest kinds of modules that keep their weights."""


def expert_stacks(module: PreTrainedModel) -> list[str]:
    """The parameters `[experts, …, …]` that hold all experts of a block in one tensor, as `target_parameters` of PEFT.

    PEFT's `all-linear` knows these names for a few architectures only. Each result is the shortest end of a name that
    ends no other parameter's name.
    """
    counts = {getattr(module.config.get_text_config(), key, None) for key in EXPERTS}
    stacks = {
        f"{name}.{leaf}"
        for name, layer in module.named_modules()
        if not type(layer).__module__.startswith("torch.nn.")
        for leaf, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim == 3 and len(parameter) in counts  # (experts, …, …)
    }
    others = [f".{name}" for name, _ in module.named_parameters() if name not in stacks]

    def shortest_end(name: str) -> str:
        parts = name.split(".")
        ends = (".".join(parts[-i:]) for i in range(1, len(parts) + 1))
        return next(end for end in ends if not any(other.endswith(f".{end}") for other in others))

    return sorted(set(map(shortest_end, stacks)))


def check_ends(setting: str, ends: Sequence[str], names: Iterable[str]) -> None:
    """Raise `UserError` for the first end of a setting that no module's name has; PEFT passes it over."""
    known = list(names)
    for end in ends:
        if not any(is_end(name, [end]) for name in known):
            hint = did_you_mean(end, {name.rpartition(".")[2] for name in known})
            raise UserError(f"{setting} {list(ends)!r}: no module's name ends with {end!r}{hint}")


def check_floats(setting: str, ends: Sequence[str], module: PreTrainedModel) -> None:
    """Raise `UserError` for the first end of a setting that names weights which are packed: none of them can learn."""
    for name, layer in module.named_modules():
        held = chain(layer.parameters(), layer.buffers())
        if is_end(name, ends) and not all(tensor.is_floating_point() for tensor in held):
            raise UserError(
                f"{setting} {list(ends)!r}: the weights of {name} are packed, and cannot be trained whole; leave it "
                "out, or name it in target_modules"
            )


def gates(module: PreTrainedModel) -> list[str]:
    """The names of linear layers whose class makes something else of the product (the router of Llama 4: a tuple)."""
    import torch

    def is_product(layer: Linear) -> bool:
        with torch.no_grad():
            # One row tells the type and the shape: (1, inputs) -> (1, outputs).
            made = layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
        return isinstance(made, torch.Tensor) and made.shape == (1, layer.out_features)

    linear = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear))
    # A layer of torch's own class makes the product.
    own = [(n, layer) for n, layer in linear if type(layer).__module__.startswith("transformers.models.")]
    return [name for name, layer in own if not is_product(layer)]


def weights_of(module: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """The number of weights of each matrix in the blocks, packed or not, and the kind of module, by name."""
    weights = {}
    for block in blocks_of(module):
        for name, layer in module.get_submodule(block).named_modules(prefix=block):
            kind = type(layer).__name__
            if hasattr(layer, "in_features"):
                # A packed weight holds several weights in an element.
                weights[name] = layer.in_features * layer.out_features, kind
            else:
                # Norms and biases have one dimension.
                matrices = ((leaf, p) for leaf, p in layer.named_parameters(recurse=False) if p.ndim > 1)
                weights |= {f"{name}.{leaf}": (p.numel(), kind) for leaf, p in matrices}
    return weights


def reached(adapted: PeftModel, weights: Mapping[str, tuple[int, str]]) -> Reach:
    """The notes on an adapted model, given the `weights` of the blocks before an adapter was put on them."""
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
        # An adapter on a module reaches all weights within.
        if not any(".".join(owners[:i]) in changed for i in range(len(owners) + 1)):
            left[kind] += count
    return {
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "reached_share": round(1 - left.total() / total, 4),
        "left_out": {kind: round(count / total, 4) for kind, count in left.most_common(3) if count > SHOWN * total},
    }


def sentence(notes: Reach) -> str:
    """The notes on an adapted model as one line."""
    left = ", ".join(f"{kind} {share:.1%}" for kind, share in notes["left_out"].items())
    share = f"the adapter reaches {notes['reached_share']:.1%} of the weights of the blocks"
    return share + (f"; left as they are: {left}" if left else "")

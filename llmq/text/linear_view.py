"""Every matrix of a language model as a separate linear layer, for a step that changes layers one by one.

transformers holds GPT-2's layers as `Conv1D`, `[inputs, outputs]`, and the experts of a mixture as one tensor a block.
Here all become `torch.nn.Linear`: the same products, under the names of files that hold each expert by itself. A `Part`
is the piece of a stored tensor that a layer's tensor is, for reading and for writing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from llmq.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Outputs = tuple[int | None, int | None, int | None]
"""Start, stop and step of the outputs of a layer in a tensor that holds the outputs of several layers."""
ALL: Outputs = (None, None, None)
FUSED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""The attributes that transformers' `use_experts_implementation` gives to experts in one tensor."""


class FusedExperts(Protocol):
    """The experts of a block in one tensor, as transformers has them."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool  # (experts, inputs, outputs)
    is_concatenated: bool  # gate before up; otherwise their outputs alternate
    down_proj: Tensor  # (experts, width, inner), or transposed
    _parameters: dict[str, Tensor]

    def act_fn(self, inner: Tensor) -> Tensor: ...  # without a gate
    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...  # (rows, 2 * inner) -> (rows, inner)


@dataclass(frozen=True)
class Part:
    """A piece of the tensor that the module names `whole`: an expert, some outputs, or all, transposed if `turned`."""

    whole: str
    expert: int | None = None
    turned: bool = False
    outputs: Outputs = ALL

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the piece in the whole tensor."""
        one = tensor if self.expert is None else tensor[self.expert]  # a matrix or a bias
        return (one.t() if self.turned else one)[slice(*self.outputs)]


def blocks_of(module: nn.Module) -> list[str]:
    """The names of a model's repeated blocks: the items of the largest list of modules."""
    lists = {name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise UserError(f"{type(module).__name__} has no list of blocks")
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))  # not the experts within a block
    return [f"{name}.{i}" for i in range(len(lists[name]))]


def make_linear(module: PreTrainedModel) -> dict[str, Part]:
    """Replace `Conv1D` and experts in one tensor by linear layers. Returns the part of each new tensor."""
    from transformers.pytorch_utils import Conv1D

    parts: dict[str, Part] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D):
            inputs, outputs = layer.weight.shape  # the transpose of a linear layer's
            module.set_submodule(name, linear(inputs, outputs, layer.weight.dtype, layer.bias is not None))
            parts[f"{name}.weight"] = Part(f"{name}.weight", turned=True)
    return parts | unfuse(module)


def unfuse(module: PreTrainedModel, packed: Iterable[str] | None = None) -> dict[str, Part]:
    """Replace experts in one tensor by linear layers for each expert. Returns the part of each new tensor.

    `packed` names packed layers: then only blocks of experts with one of them change, or all if files hold each expert
    by itself.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = [c for c in get_model_conversion_mapping(module) if is_merging(c)]
    parts: dict[str, Part] = {}
    for name, layer in list(module.named_modules()):
        if is_fused(layer) and (packed is None or conversions or any(p.startswith(f"{name}.") for p in packed)):
            experts = Experts(layer, leaf_names(conversions, name))
            module.set_submodule(name, experts)
            parts |= experts.parts(name)
    return parts


def fuse(module: PreTrainedModel) -> None:
    """Join the experts of each block in one tensor again, as transformers has them, to be saved under its names."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Experts):
            parts = layer.parts(name)
            tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            (fused,) = layer._fused
            for whole, tensor in joined(tensors, parts, {part.whole for part in parts.values()}).items():
                setattr(fused, whole.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
            module.set_submodule(name, fused)
            module._weight_conversions = None  # saving takes those of the class, not those of loading


def is_merging(conversion: WeightConverter) -> bool:
    """True if a conversion of transformers makes one tensor of experts that the files hold one by one."""
    return any(type(operation).__name__ == "MergeModulelist" for operation in getattr(conversion, "operations", ()))


def is_fused(layer: nn.Module) -> bool:
    """True if a module holds its experts as slices of one tensor."""
    down = getattr(layer, "down_proj", None)
    fused = all(hasattr(layer, word) for word in FUSED) and isinstance(down, Tensor) and down.ndim == 3
    return fused and not getattr(layer, "has_post_expert_norm", False)


def leaf_names(conversions: Iterable[WeightConverter], experts: str) -> tuple[str, str, str]:
    """The names of gate, up and down of one expert in the files: `w1`, `w3`, `w2` for Mixtral."""
    names: dict[str, Sequence[str]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for conversion in conversions:
        owner, _, target = conversion._original_target_patterns[0].rpartition(".")
        if owner.rpartition(".")[2] == experts.rpartition(".")[2]:
            sources = conversion._original_source_patterns
            names[target] = [s.rpartition("*.")[2].removesuffix(".weight") for s in sources]
    gate, up = names["gate_up_proj"]
    return gate, names.get("up_proj", (up,))[0], names["down_proj"][0]


def linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> nn.Linear:
    """A linear layer on the meta device, whose weights are loaded later."""
    return nn.Linear(inputs, outputs, bias, device="meta", dtype=dtype).requires_grad_(False)


class Experts(nn.ModuleList):
    """The experts of one block, each with linear layers of its own, and the gating of the module that they replace."""

    def __init__(self, fused: FusedExperts, names: tuple[str, str, str]):
        super().__init__()
        count, *shape = fused.down_proj.shape
        # `width` is the number of features of a token, `inner` that between up and down.
        self.width, self.inner = shape[::-1] if fused.is_transposed else shape
        self.gated, self.turned, self.interleaved = fused.has_gate, fused.is_transposed, not fused.is_concatenated
        self.names, self.biased = names, fused.has_bias
        dtype = fused.down_proj.dtype
        fused._parameters.clear()
        self._fused = (fused,)  # in a tuple, so no submodule: only its activation is used
        gate, up, down = names
        for _ in range(count):
            layers = {up: linear(self.width, self.inner, dtype, self.biased)}
            layers |= {gate: linear(self.width, self.inner, dtype, self.biased)} if self.gated else {}
            self.append(nn.ModuleDict({**layers, down: linear(self.inner, self.width, dtype, self.biased)}))

    def parts(self, name: str) -> dict[str, Part]:
        """The part of each expert's tensor in the tensors that hold all experts."""
        gate, up, down = self.names
        halves: tuple[Outputs, Outputs] = (0, None, 2), (1, None, 2)
        halves = halves if self.interleaved else ((0, self.inner, None), (self.inner, None, None))
        places: dict[str, tuple[str, Outputs]] = {gate: ("gate_up_proj", halves[0]), up: ("gate_up_proj", halves[1])}
        places = places if self.gated else {up: ("up_proj", ALL)}
        places[down] = ("down_proj", ALL)
        parts = {}
        for i in range(len(self)):
            for leaf, (whole, outputs) in places.items():
                parts[f"{name}.{i}.{leaf}.weight"] = Part(f"{name}.{whole}", i, self.turned, outputs)
                if self.biased:
                    parts[f"{name}.{i}.{leaf}.bias"] = Part(f"{name}.{whole}_bias", i, False, outputs)
        return parts

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[tokens, width]` through the experts `chosen` `[tokens, k]`, added up by `weights` `[tokens, k]`.

        Every expert is called, even for no token, so that every calibration pass reaches all layers.
        """
        made = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self):
            token, place = torch.where(chosen == i)  # of the tokens that choose this expert; which of their k it is
            out = self._through(cast(nn.ModuleDict, expert), hidden_states[token]) * weights[token, place, None]
            made.index_add_(0, token, out.to(made.dtype))
        return made

    def _through(self, expert: nn.ModuleDict, rows: Tensor) -> Tensor:
        gate, up, down = self.names
        (fused,) = self._fused
        if not self.gated:
            inner = fused.act_fn(expert[up](rows))
        elif self.interleaved:
            inner = fused._apply_gate(torch.stack([expert[gate](rows), expert[up](rows)], -1).flatten(-2))
        else:
            inner = fused._apply_gate(torch.cat([expert[gate](rows), expert[up](rows)], -1))  # (rows, inner)
        made: Tensor = expert[down](inner)  # (rows, width)
        return made


def joined(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], wholes: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by name, with the parts of each of `wholes` put together again.

    The experts of a block stay apart, each with its bias, if one of them has no dense weight any more.
    """
    rest = dict(tensors)
    for owner in {whole.rpartition(".")[0] for whole in wholes}:
        own = {name: part for name, part in parts.items() if part.whole.rpartition(".")[0] == owner}
        if own.keys() <= rest.keys():
            pieces: dict[str, list[tuple[Part, Tensor]]] = {}
            for name, part in own.items():
                pieces.setdefault(part.whole, []).append((part, rest.pop(name)))
            rest |= {whole: _put_together(several) for whole, several in pieces.items()}
    return rest


def _put_together(pieces: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """The tensor whose parts these are."""
    first, one = pieces[0]
    outputs = sum(len(tensor) for part, tensor in pieces if part.expert == first.expert)
    shape: tuple[int, ...] = (outputs, *one.shape[1:])
    shape = shape[::-1] if first.turned else shape  # (inputs, outputs)
    shape = shape if first.expert is None else (1 + max(part.expert or 0 for part, _ in pieces), *shape)
    whole = one.new_empty(shape)
    for part, tensor in pieces:
        part.of(whole).copy_(tensor)
    return whole

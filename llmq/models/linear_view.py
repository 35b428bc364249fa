"""Every matrix of a language model as a linear layer of its own, for a step that changes layers one by one.

transformers holds GPT-2's layers as `Conv1D`, `[inputs, outputs]`, and the experts of a mixture as one tensor a block.
Here they become `torch.nn.Linear`: the same products, under the names that per-expert files have for them. `Part` says
which part of a stored tensor each is, to read it and to write it back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Outputs = tuple[int | None, int | None, int | None]
"""Start, stop and step of the outputs of a layer in a tensor that holds those of several."""
ALL: Outputs = (None, None, None)
FUSED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' `use_experts_implementation` says of experts in one tensor."""


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, by the module's name for it: an expert, some of its outputs, or all of it turned."""

    whole: str
    expert: int | None = None
    turned: bool = False
    outputs: Outputs = ALL

    def of(self, tensor: Tensor) -> Tensor:
        """A view of it in the whole tensor."""
        one = tensor if self.expert is None else tensor[self.expert]
        return (one.t() if self.turned else one)[slice(*self.outputs)]


def make_linear(module: Any) -> dict[str, Part]:
    """Replace `Conv1D` and experts in one tensor by linear layers; the part that each of their tensors is."""
    from transformers.pytorch_utils import Conv1D

    parts: dict[str, Part] = {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D):
            inputs, outputs = layer.weight.shape
            module.set_submodule(name, linear(inputs, outputs, layer.weight.dtype, layer.bias is not None))
            parts[f"{name}.weight"] = Part(f"{name}.weight", turned=True)
    return parts | unfuse(module)


def unfuse(module: Any, packed: Iterable[str] | None = None) -> dict[str, Part]:
    """Replace experts in one tensor by linear layers for each; the part that each of their tensors is.

    With names of `packed` layers, only those experts of which one is packed, or all where files hold each by itself.
    """
    conversions = merging(module)
    parts: dict[str, Part] = {}
    for name, layer in list(module.named_modules()):
        if is_fused(layer) and (packed is None or conversions or any(p.startswith(f"{name}.") for p in packed)):
            experts = Experts(layer, leaf_names(conversions, name))
            module.set_submodule(name, experts)
            parts |= experts.parts(name)
    return parts


def fuse(module: Any) -> None:
    """The experts of a module in one tensor again, as transformers has them, to be saved under its names."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Experts):
            parts = layer.parts(name)
            tensors = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            (fused,) = layer._fused
            for whole, tensor in joined(tensors, parts, {part.whole for part in parts.values()}).items():
                setattr(fused, whole.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
            module.set_submodule(name, fused)
            module._weight_conversions = None  # those of its class, not those with which it was loaded


def merging(module: Any) -> list[Any]:
    """transformers' conversions that make one tensor of experts that the files hold one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [c for c in get_model_conversion_mapping(module) if is_merging(c)]


def is_merging(conversion: Any) -> bool:
    """Whether a conversion makes one tensor of many experts."""
    return any(type(operation).__name__ == "MergeModulelist" for operation in getattr(conversion, "operations", ()))


def is_fused(layer: Any) -> bool:
    """Whether a module holds experts as one tensor of which each is a slice."""
    fused = all(hasattr(layer, word) for word in FUSED) and getattr(layer, "down_proj", None) is not None
    return fused and layer.down_proj.ndim == 3 and not getattr(layer, "has_post_expert_norm", False)


def leaf_names(conversions: Iterable[Any], experts: str) -> tuple[str, str, str]:
    """What the files call gate, up and down of one expert: `w1`, `w3`, `w2` in a Mixtral's."""
    found: dict[str, Sequence[str]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for conversion in conversions:
        owner, _, target = conversion._original_target_patterns[0].rpartition(".")
        if owner.rpartition(".")[2] == experts.rpartition(".")[2]:
            sources = conversion._original_source_patterns
            found[target] = [s.rpartition("*.")[2].removesuffix(".weight") for s in sources]
    gate, up = found["gate_up_proj"]
    return gate, found.get("up_proj", (up,))[0], found["down_proj"][0]


def linear(inputs: int, outputs: int, dtype: Any, bias: bool) -> nn.Linear:
    """A linear layer without memory, to be loaded."""
    return nn.Linear(inputs, outputs, bias, device="meta", dtype=dtype).requires_grad_(False)


class Experts(nn.ModuleList):  # type: ignore[misc]
    """The experts of one block, each with linear layers of its own; gating is that of the module they come from."""

    def __init__(self, fused: Any, names: tuple[str, str, str]):
        super().__init__()
        count = len(fused.down_proj)
        shape = fused.down_proj.shape[1:]
        self.width, self.inner = shape if not fused.is_transposed else shape[::-1]
        self.gated, self.turned, self.interleaved = fused.has_gate, fused.is_transposed, not fused.is_concatenated
        self.names, self.biased = names, fused.has_bias
        dtype = fused.down_proj.dtype
        fused._parameters.clear()
        self._fused = (fused,)  # no submodule: what is left of it is an activation
        gate, up, down = names
        for _ in range(count):
            layers = {up: linear(self.width, self.inner, dtype, self.biased)}
            layers |= {gate: linear(self.width, self.inner, dtype, self.biased)} if self.gated else {}
            self.append(nn.ModuleDict({**layers, down: linear(self.inner, self.width, dtype, self.biased)}))

    def parts(self, name: str) -> dict[str, Part]:
        """Where each tensor lies in those that hold all experts."""
        gate, up, down = self.names
        halves: tuple[Outputs, Outputs] = (0, None, 2), (1, None, 2)
        halves = halves if self.interleaved else ((0, self.inner, None), (self.inner, None, None))
        places: dict[str, tuple[str, Outputs]] = {gate: ("gate_up_proj", halves[0]), up: ("gate_up_proj", halves[1])}
        places = places if self.gated else {up: ("up_proj", ALL)}
        places[down] = ("down_proj", ALL)
        found = {}
        for i in range(len(self)):
            for leaf, (whole, outputs) in places.items():
                found[f"{name}.{i}.{leaf}.weight"] = Part(f"{name}.{whole}", i, self.turned, outputs)
                if self.biased:
                    found[f"{name}.{i}.{leaf}.bias"] = Part(f"{name}.{whole}_bias", i, False, outputs)
        return found

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[tokens, width]` through the experts `chosen` `[tokens, k]`, added up by `weights` `[tokens, k]`.

        Every expert is called, with no token too, so that a calibration meets its layers in every pass.
        """
        made = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self):
            token, place = torch.where(chosen == i)
            out = self._through(expert, hidden_states[token]) * weights[token, place, None]
            made.index_add_(0, token, out.to(made.dtype))
        return made

    def _through(self, expert: Any, rows: Tensor) -> Tensor:
        gate, up, down = self.names
        (fused,) = self._fused
        if not self.gated:
            inner = fused.act_fn(expert[up](rows))
        elif self.interleaved:
            inner = fused._apply_gate(torch.stack([expert[gate](rows), expert[up](rows)], -1).flatten(-2))
        else:
            inner = fused._apply_gate(torch.cat([expert[gate](rows), expert[up](rows)], -1))
        made: Tensor = expert[down](inner)
        return made


def joined(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], wholes: Iterable[str]) -> dict[str, Tensor]:
    """Tensors with the parts of each of `wholes` put together again.

    Experts of which one has lost its dense weight stay apart, each with its bias.
    """
    rest = dict(tensors)
    owners = {whole.rpartition(".")[0] for whole in wholes}
    for owner in owners:
        its = {name: part for name, part in parts.items() if part.whole.rpartition(".")[0] == owner}
        if its.keys() <= rest.keys():
            pieces: dict[str, list[tuple[Part, Tensor]]] = {}
            for name, part in its.items():
                pieces.setdefault(part.whole, []).append((part, rest.pop(name)))
            rest |= {whole: _put_together(found) for whole, found in pieces.items()}
    return rest


def _put_together(pieces: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """The tensor of which these are all the parts."""
    first, one = pieces[0]
    outputs = sum(len(tensor) for part, tensor in pieces if part.expert == first.expert)
    shape = (outputs, *one.shape[1:])
    shape = shape[::-1] if first.turned else shape
    shape = shape if first.expert is None else (1 + max(part.expert or 0 for part, _ in pieces), *shape)
    whole = one.new_empty(shape)
    for part, tensor in pieces:
        part.of(whole).copy_(tensor)
    return whole

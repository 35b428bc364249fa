"""The networks that GGUF files hold, and the place of each tensor in a file.

Names come from the tensor maps of the package gguf. A file holds some tensors otherwise than transformers does: the
rows of Llama's queries and keys are interleaved for another rotation, Gemma's norms have 1 added, GPT-2's matrices are
transposed, and all experts of a layer are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

FILE = "model.gguf"
"""The name of the file of a stage."""
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
IN_FLOAT32 = ("position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Matrices that llama.cpp reads in float32 alone: learned positions, and routers of experts."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """A network by its name in GGUF files, with the activations that engines compute for that name."""

    name: str
    activations: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    added_to_norms: float = 0.0
    is_tied: bool = False
    """True if no engine reads an output head of its own."""


GELU = ("gelu_pytorch_tanh", "gelu_new")
ARCHITECTURES = {
    "gemma2": Architecture("gemma2", GELU, added_to_norms=1.0, is_tied=True),
    "gemma3_text": Architecture("gemma3", GELU, added_to_norms=1.0, is_tied=True),
    "gpt2": Architecture("gpt2", GELU),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", GELU),
}
"""The `model_type` of transformers -> the network as GGUF files name it."""


def architecture_of(config: PretrainedConfig, place: object) -> Architecture:
    """The network of a configuration. Raises `UserError` for one that is not written, naming those that are."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{str(place)!r} is a {config.model_type}; written as GGUF are {known}")
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file, and the tensors of the network that the tensor holds: one, or one for each expert."""

    name: str
    parts: tuple[str, ...]
    heads: int = 0
    """The number of heads whose rows are interleaved; 0 for none."""
    added: float = 0.0
    turned: bool = False
    squeezed: bool = False
    """True for a vector that transformers holds as a matrix of one row."""

    def rows(self, count: int) -> Tensor | None:
        """The row of the network that lies at each row of the file; None if rows stay."""
        import torch

        if not self.heads:
            return None
        return torch.arange(count).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """The shape in the file of parts of this shape."""
        own = tuple(part[::-1] if self.turned else part[1:] if self.squeezed else part)
        return (len(self.parts), *own) if len(self.parts) > 1 else own

    def there(self, tensor: Tensor) -> Tensor:
        """A part as the file holds it."""
        tensor = tensor.t() if self.turned else tensor.squeeze(0) if self.squeezed else tensor
        rows = self.rows(len(tensor))
        tensor = tensor if rows is None else tensor[rows]
        return tensor + self.added if self.added else tensor

    def back(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts as the network holds them, by name."""
        tensor = tensor - self.added if self.added else tensor
        rows = self.rows(len(tensor))
        tensor = tensor if rows is None else tensor[rows.argsort()]
        tensor = tensor.t() if self.turned else tensor.unsqueeze(0) if self.squeezed else tensor
        parts = tensor.unbind(0) if len(self.parts) > 1 else (tensor,)
        return {name: part.contiguous() for name, part in zip(self.parts, parts, strict=True)}


def places(config: PretrainedConfig, architecture: Architecture, names: Iterable[str]) -> list[Place]:
    """The place of each tensor of a network, in the order of the names.

    Raises `UserError` for a tensor that the architecture has no place for.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(n for n, called in MODEL_ARCH_NAMES.items() if called == architecture.name)
    known = get_tensor_name_map(number, config.num_hidden_layers)
    parts: dict[str, list[str]] = {}
    for name in names:
        place = known.get_name(EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UserError(f"{name!r} has no place in a GGUF file of a {architecture.name}; leave the export out")
        parts.setdefault(place, []).append(name)
    return [_place(config, architecture, name, tuple(sorted(each, key=_expert))) for name, each in parts.items()]


def _expert(name: str) -> int:
    found = EXPERT.search(name)
    return int(found[1]) if found else 0


def _place(config: PretrainedConfig, architecture: Architecture, name: str, parts: tuple[str, ...]) -> Place:
    heads: Mapping[str, int] = {}
    if architecture.interleaved:
        heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    return Place(
        name,
        parts,
        heads=next((count for key, count in heads.items() if key in name), 0),
        added=architecture.added_to_norms if parts[0].endswith("norm.weight") else 0.0,
        turned=architecture.name == "gpt2" and bool(re.search(r"\.c_(attn|fc|proj)\.weight$", parts[0])),
        squeezed=parts[0].endswith("shared_expert_gate.weight"),
    )

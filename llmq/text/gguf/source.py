"""The tensors of a model folder, read one at a time: as floats, or as codes on a grid where a layer is packed so."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.guarded.weights import header, opened, safetensors_of
from llmq.matrix import gptq_format
from llmq.text.formats import quantization
from llmq.text.names import stored
from llmq.text.opening import check, check_packed, stored_as, without_weights
from llmq.text.pooled import GRID, on_grid

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.matrix.grid import Quantized

UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Tensors of old files that the code makes by itself: rotary frequencies, and GPT-2's causal masks."""


class Source:
    """A folder of safetensors, plain or in the GPTQ format, under the names of the network and without copies of ties.

    Raises `UserError` for a folder that does not hold the tensors of its network.
    """

    def __init__(self, folder: Path):
        settings = quantization(folder) or {}
        if settings:
            check_packed(folder, stored_as(safetensors_of(folder)))
        else:
            check(folder)
        self.folder = folder
        self.network = without_weights(folder)
        self.config = self.network.config.get_text_config()
        self.format = str(settings.get("checkpoint_format", "gptq"))
        self._held = {name: tensor for name, tensor in stored(folder, self.network).items() if not UNUSED.search(name)}

    @cached_property
    def names(self) -> list[str]:
        """The tensors of the network that the files hold, a packed layer as one `weight`."""
        known = self.network.state_dict().keys()
        names: dict[str, None] = {}
        for name in self._held:
            owner, _, leaf = name.rpartition(".")
            if leaf in gptq_format.TENSORS:
                names[f"{owner}.weight"] = None
            elif leaf != "bias" or name in known or not self.is_packed(f"{owner}.weight"):
                names[name] = None  # AutoGPTQ's zeros stand for no bias
        ties = self.network.get_expanded_tied_weights_keys(all_submodels=True).items()
        return [
            name for name in names if not any(name == copy and self._same(copy, original) for copy, original in ties)
        ]

    def _same(self, one: str, other: str) -> bool:
        import torch

        both = one in self._held and other in self._held
        return both and torch.equal(self._read(one), self._read(other))

    def is_packed(self, name: str) -> bool:
        """True for a layer that is packed, or whose float weights lie on a grid beside them."""
        layer = name.removesuffix(".weight")
        return f"{layer}.qweight" in self._held or layer in self._grids

    @cached_property
    def _grids(self) -> dict[str, dict[str, Tensor]]:
        """Scales, zero points, groups and bits of the layers whose grid lies beside their float weights, by name."""
        if not (self.folder / GRID).exists():
            return {}
        grids: dict[str, dict[str, Tensor]] = {}
        with opened(self.folder / GRID) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                layer, _, leaf = key.rpartition(".")
                grids.setdefault(layer, {})[leaf] = tensors.get_tensor(key)
        return grids

    @property
    def has_fractional_zeros(self) -> bool:
        """True if zero points of a grid are no whole numbers."""
        return any(bool((grid["zeros"] != grid["zeros"].round()).any()) for grid in self._grids.values())

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        headers = {file: header(file) for file in {file for file, _ in self._held.values()}}
        return {name: headers[file][key].shape for name, (file, key) in self._held.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as the network holds it, `(outputs, inputs)` of a packed layer."""
        if name in self._shapes:
            return self._shapes[name]
        layer = name.removesuffix(".weight")
        (words, outputs), (_, zeros) = (self._shapes[f"{layer}.{part}"] for part in ("qweight", "qzeros"))
        return outputs, words * outputs // zeros  # a code has zeros * 32 / outputs bits, a word 32

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32; of a packed layer the values of the grid, `(outputs, inputs)`."""
        return self.packed(name).weight() if self.is_packed(name) else self._read(name).float()

    def packed(self, name: str) -> Quantized:
        """The codes and the grid of a packed layer."""
        import torch

        layer = name.removesuffix(".weight")
        if layer in self._grids:
            return on_grid(self._read(name), self._grids[layer])
        held = {part: f"{layer}.{part}" for part in gptq_format.TENSORS}
        tensors = {part: self._read(key) for part, key in held.items() if key in self._held}
        groups, outputs = tensors["scales"].shape
        bits = tensors["qzeros"].shape[1] * 32 // outputs
        inputs = tensors["qweight"].shape[0] * 32 // bits
        tensors.setdefault("g_idx", torch.arange(inputs, dtype=torch.int32) // (inputs // groups))
        return gptq_format.from_tensors(tensors, bits, self.format)

    def _read(self, name: str) -> Tensor:
        file, key = self._held[name]
        with opened(file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

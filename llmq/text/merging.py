"""Adding an adapter to its base block by block, with one block of floats in memory.

The base is opened as its files hold it: float weights stay in their files until they are read, packed ones are a
fraction of the floats. One block after another is made float32, gets the adapter's change, is rounded once and written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from llmq import resident
from llmq.environment import trim
from llmq.errors import LlmqError
from llmq.finite import first_not_finite
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import FLOATS, SINGLE, safetensors_of
from llmq.reopened import Meant, hashed
from llmq.terminal import track
from llmq.text.blockwise import shards, write, write_index
from llmq.text.bnb_layers import as_in_files, bared, nothing_like
from llmq.text.linear_view import Experts, blocks_of, fuse
from llmq.text.names import save, untie
from llmq.text.opening import dtypes_as_opened, load_causal_lm, stored_as, with_adapter
from llmq.text.pooled import changes, folded, pools, save_grid
from llmq.text.scales import quantized
from llmq.text.tokenizer import copy_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module

    from llmq.artifact import Artifact
    from llmq.matrix.grid import Quantized
    from llmq.text.family import LanguageModel

REST = ".rest"
"""The folder of all that lies outside the blocks, until it is moved beside them."""


class Merging:
    """A base whose blocks, one by one, become float32 weights with the adapter in them.

    Until then each weight of a block is a stand-in of float32 without memory, and `held` has what files hold of it.
    """

    def __init__(self, artifact: Artifact[LanguageModel], keep_sparsity: bool):
        assert artifact.adapter
        self.folder, self.keep_sparsity = artifact.weights, keep_sparsity
        # In main memory: a card that trains a packed model has seldom room for floats.
        self.module = load_causal_lm(artifact.weights, _dtype(artifact), "cpu")
        self.pooled = pools(artifact.adapter)
        self.changes: dict[str, Tensor] = {}
        if self.pooled:
            adapted = with_adapter(self.module, artifact.adapter)
            self.changes = changes(adapted)
            adapted.unload()
        self.grids: dict[str, Quantized] = {}  # of the layers that an adapter folds into, without their codes
        self.held: dict[str, Tensor | Module] = {}
        if artifact.packed:
            self.held |= {f"{name}.weight": layer for name, layer in bared(self.module).items()}
        self.pairs = untie(
            self.module
        )  # or an adapter on the head would change the embeddings, and the other way round
        self.blocks = blocks_of(self.module)
        self.weights = dict(self.module.named_parameters())  # of the base alone, under its own names
        whole = read_json_object(artifact.adapter / "adapter_config.json").get("modules_to_save") or ()
        for name, p in self.weights.items():
            if not self.is_inside(name) or set(whole) & set(name.split(".")):  # PEFT copies what it saves whole
                p.data = p.data.float()
            elif name not in self.held:
                self.held[name], p.data = p.data, nothing_like(p)
        self.adapted = None if self.pooled else with_adapter(self.module, artifact.adapter)

    def is_inside(self, name: str) -> bool:
        """True for a tensor of a block."""
        return name.startswith(tuple(f"{block}." for block in self.blocks))

    def merge(self, block: str = "") -> Module:
        """A block, or the whole of what lies outside of blocks, with weights of float32 and the adapter in them."""
        names = [n for n in self.weights if (n.startswith(f"{block}.") if block else not self.is_inside(n))]
        inside = {name: self.weights.pop(name) for name in names}  # or they would outlive the block
        for name, made in self._floats([name for name in names if name in self.held]):
            inside[name].data = made
        zeros = {name: p == 0 for name, p in inside.items() if self.keep_sparsity and p.ndim > 1}
        part: Module = self.module.get_submodule(block)
        if self.adapted is not None:
            _merge(self.adapted, part)
        for name, places in zeros.items():
            self.module.get_parameter(name).data[places] = 0
        fuse(part)
        return part

    def _floats(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights that files hold, by name; on the grid that the adapter folds into, if it does."""
        grids = quantized(self.folder, self.module, names) if self.pooled else {}
        for name in names:
            layer, held = name.removesuffix(".weight"), self.held.pop(name)
            if layer in grids:
                grid = folded(grids[layer], self.changes[layer]) if layer in self.changes else grids[layer]
                self.grids[layer] = replace(grid, codes=grid.codes[:0])
                yield name, grid.weight()
            elif isinstance(held, torch.Tensor):
                yield name, held.float()
                resident.forget([held])
            else:
                yield name, as_in_files(held)


def merge(artifact: Artifact[LanguageModel], folder: Path, dtype: str, keep_sparsity: bool = False) -> Meant:
    """Write base and adapter as one float model to `folder`, a file a block; the hashes of all tensors."""
    merging = Merging(artifact, keep_sparsity)
    module = merging.module
    if any(isinstance(layer, Experts) for layer in module.modules()):
        module._weight_conversions = None  # experts are saved as the class has them, not as packed ones were loaded
    dtypes = dtypes_as_opened(getattr(torch, dtype), module)
    *files, last = shards(folder, len(merging.blocks) + 1)
    hashes: dict[str, str] = {}
    for block, file in zip(track(merging.blocks, "blocks"), files, strict=True):
        part = merging.merge(block)
        state = _rounded(part, f"{block}.", dtypes)
        hashes |= hashed(state)
        write(revert_weight_conversion(module, state), file)
        part.to("meta")
        del state
        trim("cpu")
    merging.merge()
    state = _rounded(module, "", {name: kept for name, kept in dtypes.items() if not merging.is_inside(name)})
    hashes |= hashed(state)
    (rest := folder / REST).mkdir()
    save(module, rest, merging.pairs, tuple(f"{block}." for block in merging.blocks))
    (rest / SINGLE).rename(last)
    for file in rest.iterdir():
        file.rename(folder / file.name)
    rest.rmdir()
    write_index([*files, last])
    if merging.grids:
        save_grid(merging.grids, folder)
    copy_tokenizer(artifact.weights, folder)
    return Meant((), hashes)


def _dtype(artifact: Artifact[LanguageModel]) -> str:
    """float32 for a packed base; else the dtype of the files, whose tensors then stay in them until they are read."""
    dtypes = {tensor.dtype for tensor in stored_as(safetensors_of(artifact.weights)).values()}
    return FLOATS.get(dtypes.pop(), "float32") if len(dtypes) == 1 and not artifact.packed else "float32"


def _merge(adapted: PeftModel, part: Module) -> None:
    """Add the adapters of a part of a model to their weights, and take them off."""
    tuner = adapted.base_model
    whole, tuner.model = tuner.model, part
    try:
        tuner.merge_and_unload(safe_merge=True)
    finally:
        tuner.model = whole


def _rounded(part: Module, prefix: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a part by full name, each in its dtype. Raises `LlmqError` for one that is not finite."""
    state = {f"{prefix}{name}": tensor for name, tensor in part.state_dict(keep_vars=True).items()}
    for name, tensor in state.items():
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    made = {name: tensor.detach() for name, tensor in state.items() if name in dtypes}
    if name := first_not_finite(made):
        raise LlmqError(f"{name} is not finite in {str(made[name].dtype).removeprefix('torch.')}; set dtype: float32")
    return made

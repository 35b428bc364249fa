"""A language model whose repeated blocks stay in their files until they are called for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmq import trust
from llmq.errors import UserError
from llmq.files import BESIDE, tagged, write_json
from llmq.guarded.files import read_json_object
from llmq.guarded.weights import OTHER_NAME
from llmq.text import opening
from llmq.text.formats import FILES
from llmq.text.names import stored, tied, untied
from llmq.text.tokenizer import refuse_ids_beyond

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel

OF_OLD_WEIGHTS = ("gguf.json", "quantize_config.json")
"""Files that describe the storage of the weights before a step changed them."""


class Skeleton:
    """A model built from the configuration alone. Weights are mapped from safetensors, never read as a whole.

    `blocks` are the items of the largest list of modules; a model without a list raises `UserError`. Every matrix of
    the blocks is a linear layer, those of each expert too. `parts` maps a layer that transformers holds otherwise to
    the part of a stored tensor that it is.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu"):
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        from llmq.text.linear_view import blocks_of, make_linear

        opening.check(folder)
        self.folder, self.device, self.dtype_name, self.dtype = folder, device, dtype, getattr(torch, dtype)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
        with init_empty_weights(include_buffers=False):  # files hold few buffers; the code makes them
            self.module: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=trust.remote_code()
            ).eval()
        refuse_ids_beyond(self.module, {})
        self.parts = make_linear(self.module)
        self.blocks = blocks_of(self.module)

    @property
    def head(self) -> str:
        """The name of the output head."""
        head = self.module.get_output_embeddings()
        return next(str(name) for name, module in self.module.named_modules() if module is head)

    @property
    def inputs(self) -> dict[str, int]:
        """The number of inputs of each linear layer of the blocks, and of the head."""
        names = [*(name for block in self.blocks for name in self.linears(block)), self.head]
        return {name: self.linear(name).in_features for name in names}

    def linear(self, name: str) -> Linear:
        return cast("Linear", self.module.get_submodule(name))

    def weight(self, name: str) -> Tensor:
        """The weight of a norm or a linear layer by the full name of the layer."""
        weight: Tensor = self.module.get_parameter(f"{name}.weight").data
        return weight

    def linears(self, block: str) -> dict[str, Linear]:
        """The linear layers of a block by their full names, without gates of a single output, which are vectors."""
        import torch

        modules = self.module.get_submodule(block).named_modules(prefix=block)
        # A subclass may make something else of the product.
        return {name: m for name, m in modules if type(m) is torch.nn.Linear and m.out_features > 1}

    def share(self, layers: Iterable[str]) -> float:
        """The share of these layers in the weights of all blocks, and of the head where the head is one of these."""
        names = set(layers)
        changed = sum(self.linear(name).weight.numel() for name in names)
        parts = map(self.module.get_submodule, [*self.blocks, *({self.head} & names)])
        return float(changed / sum(p.numel() for part in parts for p in part.parameters()))

    def check_layers(self) -> None:
        """Raise `UserError` if a third of the weights of the blocks lies in no linear layer, out of a step's reach."""
        known = {name for block in self.blocks for name in self.linears(block)}
        if self.share(known) < 2 / 3:
            blocks = tuple(f"{block}." for block in self.blocks)
            others = [m for n, m in self.module.named_modules() if n.startswith(blocks) and n not in known]
            # The module that holds the weights itself, none around it.
            largest = max(others, key=lambda m: sum(p.numel() for p in m.parameters(recurse=False)))
            raise UserError(
                f"{str(self.folder)!r} ({self.config.model_type}): {1 - self.share(known):.0%} of the weights of its "
                f"blocks lie in no linear layer but in {type(largest).__name__}, which cannot be changed layer by "
                "layer; prune.layers can drop whole blocks"
            )

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, str]]:
        """File and key of every stored tensor, by the name of the tensor in the module."""
        return stored(self.folder, self.module)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        """The names in the files of each tensor, and of each module that has a weight."""
        owners = {name.rpartition(".")[0]: key.rpartition(".")[0] for name, (_, key) in self._stored.items()}
        return owners | {name: key for name, (_, key) in self._stored.items()}  # a tensor's name outweighs a module's

    def file_name(self, name: str) -> str:
        """The name in the files of a module or a tensor: `embed_out` for a GPT-NeoX's `lm_head`."""
        owner, _, leaf = name.rpartition(".")
        return self._file_names.get(name) or f"{self._file_names.get(owner, owner)}.{leaf}".removeprefix(".")

    def as_in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as the files name and hold them: dense experts in one tensor where the files have one."""
        from llmq.text.linear_view import joined

        wholes = {self.parts[name].whole for name in tensors if self._is_part(name)}
        return {self.file_name(name): tensor for name, tensor in joined(tensors, self.parts, wholes).items()}

    def _is_part(self, name: str) -> bool:
        return name in self.parts and self.parts[name].whole in self._stored

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the files in the dtype of the model, memory-mapped where stored so; None if no file has one."""
        if not self._is_part(name):
            return self._read(name)
        part = self.parts[name]
        whole = self.tensor(part.whole) if part.whole != name else self._read(name)  # a turned layer is its own part
        return None if whole is None else part.of(whole).contiguous()

    def _read(self, name: str) -> Tensor | None:
        from safetensors import safe_open

        if name not in self._stored:
            return None
        file, key = self._stored[name]
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)  # no copy if nothing changes

    def kept(self, layer: str, file: Path) -> dict[str, Tensor]:
        """The tensors of a layer, without the bias, in a file that was written from this skeleton."""
        from safetensors import safe_open

        prefix, weight = f"{self.file_name(layer)}.", f"{layer}.weight"
        with safe_open(file, "pt") as opened:
            if self._is_part(weight) and (whole := self.file_name(self.parts[weight].whole)) in opened.keys():  # noqa: SIM118
                return {"weight": self.parts[weight].of(opened.get_tensor(whole))}
            names = [key for key in opened.keys() if key.startswith(prefix) and key != f"{prefix}bias"]  # noqa: SIM118
            return {key.removeprefix(prefix): opened.get_tensor(key) for key in names}

    def load_from(self, file: Path, block: str, but: Iterable[str]) -> None:
        """Give a block the tensors of a file written from this skeleton, without the weights of the layers in `but`."""
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            for name in self.held(block):
                if name.removesuffix(".weight") not in but and (key := self.file_name(name)) in opened.keys():  # noqa: SIM118
                    self.set(name, opened.get_tensor(key).to(self.device))

    def load(self, block: str) -> None:
        """Give a block its weights. Raises `UserError` for a weight that the files do not hold."""
        for name in self.held(block):
            tensor = self.tensor(name)
            if tensor is None:
                raise self._lacks(name)
            self.set(name, tensor)

    def held(self, block: str, called: str = "") -> dict[str, Tensor]:
        """The tensors that files hold of a block, parameters and buffers, named as of the block `called` if given."""
        tensors: dict[str, Tensor] = self.module.get_submodule(block).state_dict(prefix=f"{called or block}.")
        return tensors

    def _lacks(self, name: str) -> UserError:
        called = f"{name!r}, as {type(self.module).__name__} calls it"
        return UserError(f"{str(self.folder)!r} holds no {called}; open it with transformers and save it once")

    def set(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in a parameter's place, or a buffer's."""
        import torch

        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

    def free(self, block: str) -> None:
        """Take a block's weights out of memory again."""
        self.module.get_submodule(block).to("meta")

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything stored that lies outside the blocks."""
        blocks = tuple(f"{block}." for block in self.blocks)
        for name in self.module.state_dict():
            # A tied tensor may be in no file.
            if not name.startswith(blocks) and (tensor := self.tensor(name)) is not None:
                yield name, tensor

    def _leaves_tied(self, folder: Path) -> bool:
        """True if head and embeddings are one matrix in a folder written from this skeleton, packed or not."""
        if not self.module.get_expanded_tied_weights_keys(all_submodels=True):
            return True  # nobody calls them so
        return bool(tied(self.module, {name.replace(".qweight", ".weight") for name in stored(folder, self.module)}))

    def copy_side_files(self, folder: Path, **changes: object) -> None:
        """Copy the files without weights (tokenizer, template, code), and write the configuration with `changes`."""
        copy_files(self.folder, folder)
        config = read_json_object(self.folder / "config.json")
        for key in ("torch_dtype", OTHER_NAME):
            config.pop(key, None)
        config = config if self._leaves_tied(folder) else untied(config)
        write_json(folder / "config.json", tagged({**config, "dtype": self.dtype_name, **changes}))

    @cached_property
    def tied(self) -> dict[str, str]:
        """Each tensor that the files leave out -> the stored tensor tied to it."""
        return tied(self.module, self._stored)

    def load_outside(self) -> None:
        """Give modules outside the blocks their weights, tied ones too. Raises `UserError` for a weight of no file."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, tensor in self.outside():
            # Buffers outside the blocks are those that the code made.
            if name in parameters:
                self.set(name, tensor)
        for name, source in self.tied.items():  # one memory for both
            self.set(name, self.module.get_parameter(source).data)
        blocks = tuple(f"{block}." for block in self.blocks)
        for name, parameter in self.module.named_parameters():
            if parameter.is_meta and not name.startswith(blocks):
                raise self._lacks(name)
        # The code made buffers on the CPU.
        for module in self.module.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a model without weights: tokenizer, template, code, configuration."""
    for file in (file for pattern in FILES for file in source.glob(pattern)):
        holds_weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if not holds_weights and file.name not in (*BESIDE, *OF_OLD_WEIGHTS):
            shutil.copyfile(file, folder / file.name)

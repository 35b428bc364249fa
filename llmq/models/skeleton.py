"""A language model whose repeated blocks stay in their files until they are called for."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import trust
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import BESIDE, OTHER_NAME, safetensors_of, tagged, write_json
from llmq.guarded import json_files
from llmq.models.hugging_face import PATTERNS
from llmq.models.names import tensor_names
from llmq.models.tying import tied, untied

if TYPE_CHECKING:
    from llmq.blockwise import Method

OF_OLD_WEIGHTS = ("gguf.json", "quantize_config.json")
"""What tells how the weights were stored before they changed."""


class Skeleton:
    """A model built from its configuration alone. Weights are mapped from safetensors, never read as a whole.

    `blocks` are found by structure: the items of the largest list of modules. Raises `UserError` for a model that has
    none. Every matrix of them is a linear layer, each expert's of a mixture too; `parts` says what the files have for
    those that transformers holds otherwise.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu"):
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        from llmq.models import opening
        from llmq.models.fits import refuse_ids_beyond
        from llmq.models.linear_view import make_linear

        opening.check(folder)
        self.folder, self.device, self.dtype = folder, device, getattr(torch, dtype)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code())
        with init_empty_weights(include_buffers=False):
            self.module = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=trust.remote_code()
            ).eval()
        refuse_ids_beyond(self.module, {})
        self.parts = make_linear(self.module)
        self.blocks = blocks_of(self.module)

    @classmethod
    def of(cls, artifact: Artifact, device: str = "cpu") -> "Skeleton":
        """The skeleton of an artifact's weights."""
        model: Any = artifact.model
        return cls(artifact.weights, model.dtype, device)

    @property
    def head(self) -> str:
        """The name of the output head."""
        head = self.module.get_output_embeddings()
        return next(str(name) for name, module in self.module.named_modules() if module is head)

    @property
    def inputs(self) -> dict[str, int]:
        """How many inputs each linear layer has, those of the blocks and the head."""
        names = [*(name for block in self.blocks for name in self.linears(block)), self.head]
        return {name: self.module.get_submodule(name).in_features for name in names}

    def rewrite(
        self, folder: Path, method: "Method", windows: Sequence[Sequence[int]] = (), sequential: bool = True
    ) -> list[str]:
        """Write the model to `folder`, its layers what `method` makes of them; those that no calibration came to."""
        from llmq.blockwise import rewrite
        from llmq.models import opening

        unseen = rewrite(self, folder, method, windows, sequential)
        self.copy_side_files(folder)
        opening.check(folder)
        return unseen

    def linears(self, block: str) -> dict[str, Any]:
        """The linear layers of a block by their full names; a gate of a single output is a vector, and none."""
        import torch

        modules = self.module.get_submodule(block).named_modules(prefix=block)
        return {name: m for name, m in modules if type(m) is torch.nn.Linear and m.out_features > 1}

    def share(self, layers: Iterable[str]) -> float:
        """How much these linear layers hold of the weights of all blocks, and of the head where it is one of them."""
        names = set(layers)
        changed = sum(self.module.get_submodule(name).weight.numel() for name in names)
        parts = map(self.module.get_submodule, [*self.blocks, *({self.head} & names)])
        return float(changed / sum(p.numel() for part in parts for p in part.parameters()))

    def check_layers(self) -> None:
        """Raise `UserError` if much of what the blocks hold lies in no linear layer, so that no step could reach it."""
        known = {name for block in self.blocks for name in self.linears(block)}
        if self.share(known) < 2 / 3:
            blocks = tuple(f"{block}." for block in self.blocks)
            others = [m for n, m in self.module.named_modules() if n.startswith(blocks) and n not in known]
            largest = max(others, key=lambda m: sum(p.numel() for p in m.parameters(recurse=False)))
            raise UserError(
                f"{str(self.folder)!r} ({self.config.model_type}): {1 - self.share(known):.0%} of the weights of its "
                f"blocks lie in no linear layer but in {type(largest).__name__}, which cannot be changed layer by "
                "layer; prune.layers can drop whole blocks"
            )

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, str]]:
        """File and key of every stored tensor, by the name that the module has for it."""
        return stored(self.folder, self.module)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        """What the files call each tensor, and each module that has a weight."""
        owners = {name.rpartition(".")[0]: key.rpartition(".")[0] for name, (_, key) in self._stored.items()}
        return owners | {name: key for name, (_, key) in self._stored.items()}

    def file_name(self, name: str) -> str:
        """What the files call a module or a tensor of it: `embed_out` for a GPT-NeoX's `lm_head`."""
        owner, _, leaf = name.rpartition(".")
        return self._file_names.get(name) or f"{self._file_names.get(owner, owner)}.{leaf}".removeprefix(".")

    def as_in_files(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors as the files have them and under their names: experts in one tensor if they are so, and dense."""
        from llmq.models.linear_view import joined

        wholes = {self.parts[name].whole for name in tensors if self._is_part(name)}
        return {self.file_name(name): tensor for name, tensor in joined(tensors, self.parts, wholes).items()}

    def _is_part(self, name: str) -> bool:
        return name in self.parts and self.parts[name].whole in self._stored

    def tensor(self, name: str) -> Any:
        """A tensor of the files in the model's dtype, or None; mapped where it is stored so."""
        if self._is_part(name):
            part = self.parts[name]
            return part.of(self.tensor(part.whole) if part.whole != name else self._read(name)).contiguous()
        return self._read(name)

    def _read(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._stored:
            return None
        file, key = self._stored[name]
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(key)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def kept(self, layer: str, file: Path) -> dict[str, Any]:
        """The tensors but the bias of a layer in a file that was written from here."""
        from safetensors import safe_open

        prefix, weight = f"{self.file_name(layer)}.", f"{layer}.weight"
        with safe_open(file, "pt") as opened:
            if self._is_part(weight) and (whole := self.file_name(self.parts[weight].whole)) in opened.keys():  # noqa: SIM118
                return {"weight": self.parts[weight].of(opened.get_tensor(whole))}
            names = [key for key in opened.keys() if key.startswith(prefix) and key != f"{prefix}bias"]  # noqa: SIM118
            return {key.removeprefix(prefix): opened.get_tensor(key) for key in names}

    def load(self, prefix: str) -> None:
        """Give a block its weights. Raises `UserError` for one that the files do not hold under its name."""
        for name in self.held(prefix):
            tensor = self.tensor(name)
            if tensor is None:
                raise UserError(self._lacks(name))
            self.set(name, tensor)

    def held(self, block: str, called: str = "") -> dict[str, Any]:
        """All that files hold of a block, parameters and buffers; under the name of another block, if need be."""
        tensors: dict[str, Any] = self.module.get_submodule(block).state_dict(prefix=f"{called or block}.")
        return tensors

    def _lacks(self, name: str) -> str:
        called = f"{name!r}, as {type(self.module).__name__} calls it"
        return f"{str(self.folder)!r} holds no {called}; open it with transformers and save it once"

    def set(self, name: str, tensor: Any) -> None:
        """Put a tensor in a parameter's place, or a buffer's."""
        import torch

        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

    def free(self, prefix: str) -> None:
        """Take a block's weights out of memory again."""
        self.module.get_submodule(prefix).to("meta")

    def outside(self) -> Iterator[tuple[str, Any]]:
        """Name and tensor of everything stored that lies outside the blocks."""
        for name in self.module.state_dict():
            if not any(name.startswith(f"{block}.") for block in self.blocks):
                tensor = self.tensor(name)
                if tensor is not None:
                    yield name, tensor

    def _leaves_tied(self, folder: Path) -> bool:
        """Whether head and embeddings are one matrix in a folder written from this one, packed or not."""
        if not self.module.get_expanded_tied_weights_keys(all_submodels=True):
            return True  # nobody calls them so
        return bool(tied(self.module, {name.replace(".qweight", ".weight") for name in stored(folder, self.module)}))

    def copy_side_files(self, folder: Path, **changes: Any) -> None:
        """Copy all that holds no weights (tokenizer, template, code), and the configuration of the weights there."""
        for file in (file for pattern in PATTERNS for file in self.folder.glob(pattern)):
            if (
                file.suffix != ".safetensors"
                and not file.name.endswith(".index.json")
                and file.name not in (*BESIDE, *OF_OLD_WEIGHTS)
            ):
                shutil.copyfile(file, folder / file.name)
        config = json_files.read_object(self.folder / "config.json")
        for key in ("torch_dtype", OTHER_NAME):
            config.pop(key, None)
        config = config if self._leaves_tied(folder) else untied(config)
        told = {**config, "dtype": str(self.dtype).removeprefix("torch."), **changes}
        write_json(folder / "config.json", tagged(told))

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensor that the files leave out -> the one that stands for it."""
        return tied(self.module, self._stored)

    def load_outside(self) -> None:
        """Give everything outside the blocks its weights, tied ones too."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, tensor in self.outside():
            if name in parameters:
                self.set(name, tensor)
        for name, source in self.tied.items():
            self.set(name, self.module.get_parameter(source).data)
        blocks = tuple(f"{block}." for block in self.blocks)
        for name, parameter in self.module.named_parameters():
            if parameter.is_meta and not name.startswith(blocks):
                raise UserError(self._lacks(name))
        for module in self.module.modules():
            module._buffers.update({name: b.to(self.device) for name, b in module._buffers.items() if b is not None})


def stored(folder: Path, module: Any) -> dict[str, tuple[Path, str]]:
    """File and key of every tensor in a folder, by the name that `module` has for it."""
    from safetensors import safe_open

    files = {}
    for file in safetensors_of(folder):
        with safe_open(file, "pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    names = tensor_names(module, files)
    return {names[key]: (file, key) for key, file in files.items()}


def blocks_of(module: Any) -> list[str]:
    """The names of a model's repeated blocks: the items of its largest list of modules."""
    import torch

    lists = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
    if not lists:
        raise UserError(f"{type(module).__name__} has no list of blocks")
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return [f"{name}.{i}" for i in range(len(lists[name]))]

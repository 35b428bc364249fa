"""A language model whose repeated blocks stay in their files until they are called for."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError
from llmq.files import safetensors_of, tagged, write_json
from llmq.models.hugging_face import PATTERNS
from llmq.models.tying import tied, untied
from llmq.types import Artifact

if TYPE_CHECKING:
    from llmq.blockwise import Method

OUR_OWN = ("artifact.json", "measurements.json", "gguf.json", "quantize_config.json")


class Skeleton:
    """A model built from its configuration alone. Weights are mapped from safetensors, never read as a whole.

    `blocks` are found by structure: the items of the largest list of modules. Raises `UserError` for a model that has
    none, or none with plain linear layers.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu", trust_remote_code: bool = False):
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder, self.device, self.dtype = folder, device, getattr(torch, dtype)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            self.module = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=trust_remote_code
            ).eval()
        self.blocks = _blocks(self.module)
        if not any(self.linears(block) for block in self.blocks):
            raise UserError(f"the blocks of {str(folder)!r} ({self.config.model_type}) hold no plain linear layer")

    @classmethod
    def of(cls, artifact: Artifact, device: str = "cpu") -> "Skeleton":
        """The skeleton of an artifact's weights."""
        model: Any = artifact.model
        return cls(artifact.weights, model.dtype, device, model.trust_remote_code)

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
    ) -> None:
        """Write the model to `folder`, its layers being what `method` makes of them."""
        from llmq.blockwise import rewrite

        rewrite(self, folder, method, windows, sequential)
        self.copy_side_files(folder)

    def linears(self, block: str) -> dict[str, Any]:
        """The linear layers of a block by their full names."""
        import torch

        modules = self.module.get_submodule(block).named_modules(prefix=block)
        return {name: module for name, module in modules if type(module) is torch.nn.Linear}

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, str]]:
        """File and key of every stored tensor, by the name that the module has for it."""
        return stored(self.folder, self.module)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        return {name.rpartition(".")[0]: key.rpartition(".")[0] for name, (_, key) in self._stored.items()}

    def file_name(self, name: str) -> str:
        """What the files call a module or a tensor of it: `embed_out` for a GPT-NeoX's `lm_head`."""
        owner, _, leaf = name.rpartition(".")
        return self._file_names.get(name) or f"{self._file_names.get(owner, owner)}.{leaf}".removeprefix(".")

    def as_in_files(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors under the names that the files have for them."""
        return {self.file_name(name): tensor for name, tensor in tensors.items()}

    def tensor(self, name: str) -> Any:
        """A tensor of the files in the model's dtype, or None; mapped where it is stored so."""
        from safetensors import safe_open

        if name not in self._stored:
            return None
        file, key = self._stored[name]
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(key)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def load(self, prefix: str) -> None:
        """Give a block its weights. Raises `UserError` for one that the files do not hold under its name."""
        module = self.module.get_submodule(prefix)
        for name, _ in [*module.named_parameters(prefix=prefix)]:
            tensor = self.tensor(name)
            if tensor is None:
                raise UserError(self._lacks(name))
            self.set(name, tensor)

    def _lacks(self, name: str) -> str:
        called = f"{name!r}, as {type(self.module).__name__} calls it"
        return f"{str(self.folder)!r} holds no {called}; open it with transformers and save it once"

    def set(self, name: str, tensor: Any) -> None:
        """Put a tensor in a parameter's place."""
        import torch

        owner, _, leaf = name.rpartition(".")
        self.module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

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
            if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.name not in OUR_OWN:
                shutil.copyfile(file, folder / file.name)
        config = json.loads((self.folder / "config.json").read_text())
        config.pop("torch_dtype", None)
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
    layers = {key.rpartition(".")[0] for key in files}
    names = module_names(module, layers)
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": (files[key], key) for key in files}


def module_names(module: Any, layers: Iterable[str]) -> dict[str, str]:
    """What a transformers model calls the layers of a file: it renames what older files hold, and adds its prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(module) if isinstance(r, WeightRenaming)]
    known = dict(module.state_dict())
    names = {}
    for layer in layers:
        name, _ = rename_source_key(f"{layer}.weight", renamings, [], module.base_model_prefix, known)
        names[layer] = name.removesuffix(".weight")
    return names


def _blocks(module: Any) -> list[str]:
    import torch

    lists = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
    if not lists:
        raise UserError(f"{type(module).__name__} has no list of blocks")
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return [f"{name}.{i}" for i in range(len(lists[name]))]

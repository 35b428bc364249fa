"""The sketch of a language model, from the configuration in a folder, a GGUF file, the hub, or kept here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import at_home
from llmq.guarded.files import library
from llmq.sketch import Part, Sketch, Work
from llmq.types import JsonObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEPT = Path(__file__).with_name("configurations.json")
"""The configurations of built-in words, and of models on the hub of several sizes."""


@dataclass(frozen=True)
class TextSketch(Sketch):
    """A language model: its tensors, and the widths that decide the activations."""

    hidden: int = 0
    inner: int = 0
    """The widest input of a layer of a block, which is that of the MLP's last."""
    heads: int = 0
    queries: int = 0
    keys: int = 0
    """The width of keys and values together."""
    vocabulary: int = 0
    blocks: tuple[str, ...] = ()
    base: TextSketch | None = field(default=None, compare=False, repr=False)
    """The untouched model that this one was made of; None for that one itself."""

    @property
    def untouched(self) -> TextSketch:
        return self.base or self

    @cached_property
    def linears(self) -> tuple[Part, ...]:
        """The linear layers of the blocks."""
        return tuple(part for part in self.parts if part.role == "linear")

    @property
    def head(self) -> str:
        """The name of the parameter of the output head, which may be that of the embeddings."""
        by_role = {part.role: part.name for part in self.parts if part.role in ("head", "embedding")}
        return by_role.get("head") or by_role["embedding"]

    def rewritten(self, made: Sketch, changed: Iterable[str], windows: int, length: int, gathers: bool) -> Work:
        """Block by block, with one in memory at a time."""
        from llmq.text.sizing.work import by_blocks

        return by_blocks(self, made, changed, windows, length, gathers)

    def timed(self, prompt_tokens: int, new_tokens: int, batch_size: int) -> Work:
        """A prefill and a decode."""
        from llmq.text.sizing.work import timed

        return timed(self, prompt_tokens, new_tokens)

    @property
    def block_bytes(self) -> int:
        """The bytes in memory of the largest block."""
        sizes = dict.fromkeys(self.blocks, 0)
        for part in self.parts:
            block = next(iter(_block_of(part.name, self.blocks)), None)
            if block is not None:
                sizes[block] += part.opened
        return max(sizes.values(), default=0)

    @property
    def outside_bytes(self) -> int:
        """The bytes in memory of everything outside the blocks."""
        return sum(part.opened for part in self.parts if not _block_of(part.name, self.blocks))


def as_text(sketch: Sketch) -> TextSketch:
    """The sketch of a language model, which the steps and tasks of language models get."""
    return cast(TextSketch, sketch)


def _block_of(name: str, blocks: tuple[str, ...]) -> list[str]:
    if not blocks or not name.startswith(f"{blocks[0].rpartition('.')[0]}."):
        return []
    stem = blocks[0].rpartition(".")[0]
    return [f"{stem}.{name.removeprefix(f'{stem}.').partition('.')[0]}"]


def sketch_of(weights: str, dtype: str) -> TextSketch:
    """The sketch of a model; its weights need not be there.

    Raises `UserError` for a configuration that is not there, or not of a causal language model.
    """
    if weights in kept() and not at_home(weights).exists():
        return _of_kept(weights, dtype)
    return _sketched(configuration(weights), weights, dtype)


@lru_cache(maxsize=16)
def _of_kept(name: str, dtype: str) -> TextSketch:
    from transformers import AutoConfig

    return _sketched(AutoConfig.for_model(**kept()[name]), name, dtype)


@cache
def kept() -> dict[str, JsonObject]:
    """The configurations in the repository, by built-in word or hub id."""
    configurations: dict[str, JsonObject] = json.loads(KEPT.read_text(encoding="utf-8"))
    return configurations


def _sketched(config: PretrainedConfig, weights: str, dtype: str) -> TextSketch:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with library(Path(weights), "configuration"), init_empty_weights():
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust.remote_code())
    if getattr(config, "quantization_config", None):
        return TextSketch((), dtype, unknown="its weights are packed already, and only their files tell the sizes")
    return _drawn(module, config.get_text_config(), dtype)


def _drawn(module: Any, settings: Any, dtype: str) -> TextSketch:
    from torch import nn

    from llmq.text.linear_view import blocks_of, make_linear

    make_linear(module)
    blocks = tuple(blocks_of(module))
    within = tuple(f"{block}." for block in blocks)
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = set(module.get_expanded_tied_weights_keys(all_submodels=True))
    kinds: dict[str, str] = {}
    for name, layer in module.named_modules():
        if layer is embedding:
            kinds[f"{name}.weight"] = "embedding"
        elif layer is head:
            kinds[f"{name}.weight"] = "head"
        elif type(layer) is nn.Linear and name.startswith(within) and layer.out_features > 1:
            kinds[f"{name}.weight"] = "linear"
    parts = tuple(
        Part.plain(name, tuple(p.shape), dtype, kinds.get(name, "other"))
        for name, p in module.named_parameters(remove_duplicate=False)
        if name not in tied
    )
    matrices = [part.shape for part in parts if part.role == "linear"]
    heads = int(getattr(settings, "num_attention_heads", 1) or 1)
    width = int(getattr(settings, "head_dim", None) or settings.hidden_size // heads)
    shared = int(getattr(settings, "num_key_value_heads", None) or heads)
    return TextSketch(
        parts,
        dtype,
        hidden=int(settings.hidden_size),
        inner=max((inputs for _, inputs in matrices), default=0),
        heads=heads,
        queries=heads * width,
        keys=2 * shared * width,
        vocabulary=int(settings.vocab_size),
        blocks=blocks,
    )


def configuration(weights: str) -> PretrainedConfig:
    """The configuration of a model that is not kept here; of a repository of the hub it is fetched alone."""
    from transformers import AutoConfig

    from llmq.text.formats import is_hub_id

    path = at_home(weights)
    trusted = {"trust_remote_code": trust.remote_code()}
    if path.is_dir() and (path / "config.json").is_file():
        with library(path, "configuration"):
            return AutoConfig.from_pretrained(path, **trusted)
    if path.is_file() and weights.endswith(".gguf"):
        with library(path, "GGUF model"):
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **trusted)
    if not is_hub_id(weights):
        raise UserError(
            f"{weights!r} is no folder with config.json, no .gguf file, no hub id (owner/name) and no built-in word"
            f"{did_you_mean(weights, kept())}"
        )
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        here = try_to_load_from_cache(weights, "config.json")
        if not isinstance(here, str):
            # The download asks six times, for 25 seconds, where no hub is reached; this asks once.
            get_hf_file_metadata(hf_hub_url(weights, "config.json"), timeout=10)
            here = hf_hub_download(weights, "config.json")
        file = Path(here)
    except Exception as error:  # noqa: BLE001 - of any kind: no network, no such repository, no right to it
        raise UserError(
            f"the configuration of {weights!r} is not on this machine, and the hub does not give it "
            f"({type(error).__name__}); name a folder with its config.json"
        ) from None
    with library(file.parent, "configuration"):
        return AutoConfig.from_pretrained(file.parent, **trusted)


def download(weights: str) -> str:
    """The hub id to download, or an empty string for weights that are here, or carried by a package."""
    from llmq.text.formats import is_hub_id

    if not is_hub_id(weights):
        return ""
    from huggingface_hub import try_to_load_from_cache

    here = [try_to_load_from_cache(weights, name) for name in ("model.safetensors", "model.safetensors.index.json")]
    return "" if any(isinstance(file, str) for file in here) else weights

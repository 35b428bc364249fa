"""A stage in GGUF is opened in torch, with every tensor dequantized, and compared with transformers' own reading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.environment import release_memory
from llmq.errors import LlmqError, UserError
from llmq.guarded import gguf_files
from llmq.text.gguf.layout import FILE, HEAD, architecture_of, places
from llmq.text.opening import causal_lm, without_weights

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A tensor of all experts in transformers -> the tensors of one expert in files."""
AT_ONCE = 2**20
"""Weights that are dequantized at a time."""
APART = 1e-3
"""The largest difference of logits, as a share of their norm, between two readings of one file."""


def load_gguf(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """The network of a stage in GGUF, dequantized, in evaluation mode.

    The configuration beside the file makes the network: transformers rebuilds not all settings from a file.
    """
    import gguf
    import torch
    from transformers import AutoConfig

    gguf_files.check(folder / FILE)
    network = without_weights(folder)
    config = network.config.get_text_config()
    with gguf_files.parsed_once():
        tensors = gguf.GGUFReader(str(folder / FILE)).tensors
    names = list(names_of(network, has_head=any(tensor.name == HEAD for tensor in tensors)))
    found = {place.name: place for place in places(config, architecture_of(config, folder), names)}
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if place := found.get(tensor.name):
            wanted = getattr(torch, dtype)
            parts = place.back(floats(tensor, torch.float32 if place.added else wanted))
            state |= {name: part.to(wanted) for name, part in parts.items()}
    module, info = type(network).from_pretrained(
        None,
        config=AutoConfig.from_pretrained(folder),
        state_dict=state,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    if faults := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"{str(folder / FILE)!r} does not hold what {type(module).__name__} needs: {faults[0]}")
    return module.to(device).eval()


def floats(tensor: ReaderTensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a file, dequantized a few rows at a time: in float32 embeddings alone may be as large as the rest."""
    import torch
    from gguf.quants import dequantize, quant_shape_from_byte_shape

    blocks = tensor.data.dtype == "uint8"
    shape = quant_shape_from_byte_shape(tensor.data.shape, tensor.tensor_type) if blocks else tensor.data.shape
    made = torch.empty(tuple(shape), dtype=dtype)
    rows = max(1, AT_ONCE * len(made) // max(1, made.numel()))
    for start in range(0, len(made), rows):
        made[start : start + rows] = torch.from_numpy(
            dequantize(tensor.data[start : start + rows], tensor.tensor_type).copy()
        )
    return made


def names_of(network: PreTrainedModel, has_head: bool) -> Iterator[str]:
    """The tensors of a network as files name them: each expert apart, and no tied head where the file has none."""
    held = network.state_dict()
    tied = () if has_head else network.get_expanded_tied_weights_keys(all_submodels=True)
    for name in (name for name in held if name not in tied):  # in their order, or errors would name another each time
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".experts") and leaf in EXPERTS:
            for expert in range(len(held[name])):
                yield from (f"{owner}.{expert}.{each}.weight" for each in EXPERTS[leaf])
        elif not re.search(r"inv_freq$|\.attn\.(masked_)?bias$", name):
            yield name


def check_logits(folder: Path, dtype: str, device: str, probe: Any) -> float:
    """The distance of the logits of two readings of a file, as a share of their norm: this one, and transformers'.

    Raises `LlmqError` for readings that are further apart than `APART`, and for settings that transformers reads
    otherwise.
    """
    ours = probe(load_gguf(folder, dtype, device))[0].double()
    release_memory(device)  # or the first network would lie beside the second
    theirs = probe(_read_by_transformers(folder, dtype, device))[0].double()
    apart = float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))
    if not apart <= APART:  # not >: NaN
        raise LlmqError(f"{str(folder / FILE)!r}: transformers reads other logits from the file, apart by {apart:.1e}")
    return apart


def _read_by_transformers(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, GgufConfig, LlamaConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    said: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    _check_settings(folder, config, said)
    if config.model_type == "mistral":  # which the file calls a Llama
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    options = {"dtype": getattr(torch, dtype), "quantization_config": GgufConfig(dequantize=True)}
    return causal_lm(folder, gguf_file=FILE, config=config, **options).to(device).eval()


def _check_settings(folder: Path, config: PretrainedConfig, said: PretrainedConfig) -> None:
    """Raise `LlmqError` unless transformers reads the settings of the network from the file."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    config = config.get_text_config()
    read = GGUF_CONFIG_MAPPING["llama" if config.model_type == "mistral" else said.model_type.removesuffix("_text")]
    for name in {n for n in read.values() if n and hasattr(config, n)}:
        is_, meant = getattr(said, name, None), getattr(config, name)
        same = (
            abs(is_ - meant) <= 1e-6 * abs(meant)
            if isinstance(meant, int | float) and is_ is not None
            else is_ == meant
        )
        if not same:
            raise LlmqError(f"{str(folder / FILE)!r}: transformers reads {name} {is_} from the file, meant is {meant}")

"""What a GGUF file says of its network beside the tensors: shapes, rotary positions, windows, experts.

An engine computes some settings of a network from its name alone. A network with other settings is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.text.gguf.layout import Architecture
from llmq.types import JsonObject

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from gguf import GGUFReader, GGUFWriter
    from torch import Tensor
    from transformers import PretrainedConfig

GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""The layers by which engines know the Gemma that scales queries by its width."""
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
WINDOW_EVERY = {"gemma2": 2, "gemma3": 6}
"""Every second or sixth layer of a Gemma sees all tokens, and the others a window."""
WITHOUT_BIASES = ("gemma2", "gemma3", "qwen3", "qwen3moe")
"""Networks whose attention ends in a product without a bias; llama.cpp opens no file that has more tensors."""
HEADS_FILL_WIDTH = ("phi3", "qwen2", "qwen2moe", "stablelm", "starcoder2")
"""Networks whose heads are as wide together as the network; llama.cpp opens no file of another shape."""
WITH_A_HEAD = ("qwen2moe", "stablelm")
"""Networks that llama.cpp opens only with an output head of their own."""
YARN = {
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Settings of YaRN in transformers -> their keys in files."""
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
"""The scaling of Llama 3.1 to 3.3 but for its factor; a file holds only what it makes of each frequency."""
PLAIN_YARN = {"mscale": None, "mscale_all_dim": None, "truncate": True}
"""Settings of YaRN that no key of a file holds, and the values that engines compute."""


def check(config: PretrainedConfig, architecture: Architecture) -> None:
    """Raise `UserError` for a network that an engine would compute otherwise."""
    if fault := next(_faults(config, architecture), ""):
        raise UserError(f"this {config.model_type} cannot be written as GGUF: {fault}")


def _faults(config: PretrainedConfig, architecture: Architecture) -> Iterator[str]:
    name = architecture.name
    activation = next((getattr(config, k, None) for k in ("hidden_activation", "hidden_act", "activation_function")
                       if getattr(config, k, None)), None)  # fmt: skip
    if activation not in architecture.activations:
        yield f"its activation is {activation!r}, and engines compute {architecture.activations[0]!r}"
    if getattr(config, "qk_layernorm", False):
        yield "its queries and keys are normalized (qk_layernorm)"
    if name == "gpt2" and not (config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx):
        yield "its attention is not scaled by the width of a head"
    if name in ("qwen2moe", "qwen3moe"):
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            yield "some of its layers have no experts (mlp_only_layers, decoder_sparse_step)"
        if config.norm_topk_prob != (name == "qwen3moe"):
            yield f"norm_topk_prob is {config.norm_topk_prob}, and engines know this network otherwise"
    if name in WINDOW_EVERY:
        yield from _gemma_faults(config, name)
    yield from _faults_of_shape(config, name)
    yield from _faults_of_rope(config, name)


def _faults_of_shape(config: PretrainedConfig, name: str) -> Iterator[str]:
    """Tensors, or shapes, with which llama.cpp does not open a file."""
    if name in WITHOUT_BIASES and config.attention_bias:
        yield "its attention has biases (attention_bias), which engines do not read"
    if name == "starcoder2" and not config.use_bias:
        yield "its layers have no biases (use_bias), which engines need"
    if name in HEADS_FILL_WIDTH and (width := head_dim(config) * config.num_attention_heads) != config.hidden_size:
        yield f"its heads are {width} wide together (head_dim), and engines read {config.hidden_size} (hidden_size)"
    if name in WITH_A_HEAD and config.tie_word_embeddings:
        yield "its output head is its embeddings (tie_word_embeddings), and engines read a head of its own"


def _faults_of_rope(config: PretrainedConfig, name: str) -> Iterator[str]:
    rope = rope_of(config)
    kind, allowed = rope.get("rope_type", "default"), {"default", "linear", "yarn"}
    allowed |= {"llama3"} if name == "llama" else {"longrope"} if name == "phi3" else set()
    if kind not in allowed:
        yield f"its rotary positions are of type {kind!r}, and {', '.join(sorted(allowed))} are written"
    odd = [key for key, value in PLAIN_YARN.items() if kind == "yarn" and rope.get(key, value) != value]
    if odd:
        yield f"{odd[0]} of its rotary positions is {rope[odd[0]]}, which a file has no key for"


def _gemma_faults(config: PretrainedConfig, name: str) -> Iterator[str]:
    every = WINDOW_EVERY[name]
    expected = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(config.layer_types))
    ]
    if config.layer_types != expected:
        yield f"its layers with a window are not all but every {every}th (layer_types)"
    scaled = _query_scalar(config, name)
    if config.query_pre_attn_scalar != scaled:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and engines take {scaled:g}"
    caps = [config.attn_logit_softcapping, config.final_logit_softcapping]
    if name == "gemma2" and not all(caps):
        yield "its logits have no soft cap"
    if name == "gemma3" and any(caps):
        yield "its logits have a soft cap, which engines leave out"
    if getattr(config, "use_bidirectional_attention", False):
        yield "its tokens attend to later ones (use_bidirectional_attention)"
    local = (config.rope_parameters or {}).get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        yield f"the rotary positions of its layers with a window are of type {local!r}, and engines scale none there"


def _query_scalar(config: PretrainedConfig, name: str) -> float:
    """The number whose root engines divide the queries of a Gemma by."""
    of_width = config.num_hidden_layers == GEMMA_27B[name]
    scalar: float = config.hidden_size / config.num_attention_heads if of_width else config.head_dim
    return scalar


def rope_of(config: PretrainedConfig) -> JsonObject:
    """The settings of rotary positions; those of layers that see all tokens where a network has two sorts."""
    settings = getattr(config, "rope_parameters", None) or {}
    chosen: JsonObject = settings.get("full_attention", settings)
    return chosen


def window_left_out(config: PretrainedConfig, architecture: Architecture) -> int | None:
    """The window of a network whose window has no place in the format; None without one."""
    if architecture.name in WINDOW_EVERY or architecture.name == "phi3":
        return None
    width = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    positions = config.max_position_embeddings
    return width if width and width < positions else None


def describe(writer: GGUFWriter, config: PretrainedConfig, architecture: Architecture, rows: int) -> None:
    """Write the settings of a network with `rows` embeddings."""
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    inner = config.n_inner or 4 * width if architecture.name == "gpt2" else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    shared = None if architecture.name == "gpt2" else getattr(config, "num_key_value_heads", None)
    writer.add_head_count_kv(shared or heads)
    writer.add_vocab_size(rows)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        names = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, n) for n in names if hasattr(config, n)))
    if architecture.name == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if architecture.name != "gpt2":
        head = head_dim(config)
        writer.add_key_length(head)
        writer.add_value_length(head)
        _describe_rope(writer, config, head)
    if architecture.name in WINDOW_EVERY:
        writer.add_sliding_window(config.sliding_window)
        for cap, add in (("attn", writer.add_attn_logit_softcapping), ("final", writer.add_final_logit_softcapping)):
            if value := getattr(config, f"{cap}_logit_softcapping", None):
                add(value)
    if architecture.name == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if shared := getattr(config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(shared)


def head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe_rope(writer: GGUFWriter, config: PretrainedConfig, head: int) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    writer.add_rope_dimension_count(int(head * share))
    writer.add_rope_freq_base(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if kind in ("yarn", "longrope"):
        whole = config.max_position_embeddings
        trained = int(rope.get("original_max_position_embeddings") or whole)
        writer.add_rope_scaling_orig_ctx_len(trained)
        if kind == "longrope":
            grown = math.sqrt(1 + math.log(whole / trained) / math.log(trained)) if whole > trained else 1.0
            writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or grown)


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors by which engines divide rotary frequencies, for positions scaled frequency by frequency."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{w}.weight": torch.tensor(rope[f"{w}_factor"]).float() for w in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = head_dim(config)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    return {"rope_freqs.weight": plain / scaled}


def restore(file: Path, config: PretrainedConfig) -> None:
    """Give a configuration what transformers leaves in a GGUF file: scaled rotary positions, a Gemma's queries, caps.

    Raises `UserError` for a scaling that no configuration of transformers is known for.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(file))  # as transformers names it, so that the file is parsed once
    name = str(reader.fields["general.architecture"].contents())
    told = {key.removeprefix(f"{name}."): field.contents() for key, field in reader.fields.items()}
    if name in GEMMA_27B:
        config.query_pre_attn_scalar = _query_scalar(config, name)
        config.update({cap: told[cap] for cap in CAPS if cap in told})
        if theta := told.get("rope.freq_base_swa"):
            config.rope_parameters["sliding_attention"]["rope_theta"] = theta
    _restore_rope(file, config, reader, {key.removeprefix("rope."): value for key, value in told.items()})


def _restore_rope(file: Path, config: PretrainedConfig, reader: GGUFReader, said: JsonObject) -> None:
    factors = {t.name: t.data for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))}
    rope = rope_of(config)
    if not rope or rope.get("rope_type", "default") != "default":  # without such positions, or read
        return
    turned = said.get("dimension_count")
    if turned and "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = turned / head_dim(config)
    kind = said.get("scaling.type", "linear")
    factor = float(said.get("scaling.factor") or said.get("scale_linear") or 1.0)
    if "rope_freqs.weight" in factors:
        _restore_llama3(file, config, factors["rope_freqs.weight"])
    elif factors:
        trained = said["scaling.original_context_length"]
        config.original_max_position_embeddings = trained
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": trained}
        rope |= {f"{w}_factor": factors[f"rope_factors_{w}.weight"].tolist() for w in ("short", "long")}
        rope["attention_factor"] = said.get("scaling.attn_factor")
    elif kind in ("linear", "yarn") and factor != 1:
        more = {name: said.get(f"scaling.{key}") for name, key in YARN.items() if kind == "yarn"}
        rope |= {"rope_type": kind, "factor": factor, **{k: v for k, v in more.items() if v is not None}}
    elif kind not in ("none", "linear", "yarn"):
        raise _unknown_scaling(file, f"by {kind!r}")


def _restore_llama3(file: Path, config: PretrainedConfig, factors: np.ndarray) -> None:
    """Take the factors of a Llama 3, known by their largest; all of them must then be the same."""
    import torch

    held = torch.from_numpy(factors.copy()).float()
    if bool((held == 1).all()):
        return
    rope_of(config).update({**LLAMA3, "factor": round(float(held.max()), 3)})
    if not torch.allclose(rope_tensors(config)["rope_freqs.weight"], held, rtol=1e-3):
        raise _unknown_scaling(file, "frequency by frequency (rope_freqs), and not as those of Llama 3")


def _unknown_scaling(file: Path, how: str) -> UserError:
    return UserError(
        f"{str(file)!r}: its rotary positions are scaled {how}, which is not read from a GGUF file; take the weights "
        "as safetensors"
    )

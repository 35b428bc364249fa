"""Tiny random models of the architectures of language models that people bring, with one tokenizer for all."""

import json
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Architectures name the number of experts differently; a configuration keeps the names that it knows.
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
HEADS_OF_16 = {"head_dim": 16}
SLIDING = {**HEADS_OF_16, "sliding_window": 64}
OLD_NAMES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 32}
DELTA_NET = {
    **HEADS_OF_16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA_HEADS, "num_hidden_layers": 3, "attn_layer_indices": [0, 2], "attn_rotary_emb": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "deepseek_v3": {**LATENT, **EXPERTS},
    "falcon": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": OLD_NAMES,
    "gpt_neox": {},
    "gpt_oss": {**SLIDING, **EXPERTS},
    "gptj": {**OLD_NAMES, "rotary_dim": 8},
    "granite": {},
    "granitemoehybrid": {
        **MAMBA_HEADS,
        **EXPERTS,
        "num_hidden_layers": 3,
        "layer_types": ["attention", "mamba", "attention"],
        "mamba_expand": 2,
        "shared_intermediate_size": 64,
    },
    "jamba": {
        **EXPERTS,
        "mamba_dt_rank": 8,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 32},
    "mistral": {},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
    "olmo": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": HEADS_OF_16,
    "qwen3_moe": {**HEADS_OF_16, **EXPERTS},
    "qwen3_next": {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 64},
    "recurrent_gemma": {
        **HEADS_OF_16,
        "num_hidden_layers": 4,
        "block_types": ["attention", "recurrent", "attention", "recurrent"],
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 64,
    },
    "smollm3": {"pad_token_id": 0},
    "stablelm": {},
    "starcoder2": {},
}


def build(architecture: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Save a random float32 model whose every layer matters, and the tokenizer of another folder beside it.

    `changes` are settings of the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    shape = {**SHAPE, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(architecture, vocab_size=len(words), **shape)
    config.update({"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Initial weights of 0.02 would make a model whose blocks hardly change what passes through them.
        if parameter.ndim >= 2 and name.endswith(("weight", "proj")):
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """Save a random bfloat16 Llama of 2 layers, and a byte-level tokenizer of 400 tokens trained for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained_bpe(), eos_token=SPECIAL[2])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[:2])})
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_bpe() -> object:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([topics["compound"], topics["specialnames"]], trainer)
    return bpe


def additions(path: Path) -> Path:
    """Write 20 prompt/completion rows."""
    rows = [{"prompt": f"What is {i} plus {i + 1}? ", "completion": f"It is {2 * i + 1}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

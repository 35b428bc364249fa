"""Every family of language models that people bring: quantized, tuned and measured, its examples kept apart."""

import pytest
import torch
from helpers import apply, base_of, logits_of, some_ids

from llmq import plugin

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "qwen2": ({**SHAPE, "num_key_value_heads": 2}, "used"),
    "qwen3": (GROUPED, "used"),
    "mistral": ({**GROUPED, "sliding_window": None}, "used"),
    "gemma": (GROUPED, "used"),
    "gemma2": (GROUPED, "softcapping"),
    "gemma3_text": (GROUPED, "sliding_window"),
    "phi3": ({**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}, "used"),
    "gpt_neox": ({**SHAPE, "attention_dropout": 0.0}, "used"),
    "opt": ({"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "attention_dropout": 0.0}, "used"),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, "attn_pdrop"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_tuned_and_measured(family, tiny_llama, tiny_jsonl, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape, path = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), max_position_embeddings=512,
                                  eos_token_id=tokenizer.eos_token_id, **shape)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    stage = apply("quantize.bnb", base_of(tmp_path / "model"), tmp_path / "q", bits=8 if family == "gpt2" else 4)
    stage = apply(
        "adapt.lora", stage, tmp_path / "a", data=str(tiny_jsonl), max_length=64, max_steps=2, lora_dropout=0.0
    )
    assert path in stage.notes["training"]["fast_path"]
    with stage.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()
        for word in ("size", {"perplexity": {"data": str(tiny_jsonl)}}):
            assert list(plugin.build(word, "tasks").score(loaded))


def test_a_model_that_sees_across_examples_is_trained_one_a_row(tiny_llama, tiny_jsonl, tmp_path):
    """OPT makes its mask without looking at positions; with dropout in its attention it must train by that mask."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    shape = {**FAMILIES["opt"][0], "attention_dropout": 0.1}
    config = OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    torch.manual_seed(0)
    OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stage = apply(
        "adapt.lora", base_of(tmp_path / "model"), tmp_path / "a", data=str(tiny_jsonl), max_length=64, max_steps=2
    )
    training = stage.notes["training"]
    assert "attention_dropout" in training["fast_path"]
    assert training["packing"] is False

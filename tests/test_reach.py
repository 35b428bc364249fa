"""An adapter on `all-linear` trains the experts of a mixture too, and says what share of the weights it reaches."""

import pytest
import torch
from helpers import apply, base_of, logits_of, some_ids

from llmq.errors import UserError
from llmq.text.reach import expert_stacks, reached, sentence, weights_of

IDS = some_ids()
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
DBRX = {
    "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
}  # fmt: skip
FAMILIES = {
    "mixtral": {**SHAPE, "intermediate_size": 64, "num_local_experts": 4},
    "granitemoe": {**SHAPE, "intermediate_size": 64, "num_local_experts": 4},
    "gpt_oss": {**SHAPE, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16},
    "llama4_text": {
        **SHAPE, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 16,
    },
    "jetmoe": {
        "hidden_size": 64, "num_hidden_layers": 2, "kv_channels": 16, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 32,
    },
    "dbrx": DBRX,
}  # fmt: skip
QUICK = {"r": 4, "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}


@pytest.fixture
def folder(request, tiny_llama, tmp_path):
    """A tiny random mixture of experts of one architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(request.param, vocab_size=416, **special, **FAMILIES[request.param])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:  # Llama 4's are zeros, or whatever memory held
            parameter.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


EACH = [pytest.param(f, marks=() if f == "granitemoe" else pytest.mark.slow) for f in FAMILIES if f != "dbrx"]


@pytest.mark.parametrize("folder", EACH, indirect=True)
def test_experts_in_one_tensor_are_trained_reopened_and_merged(folder, tiny_jsonl, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = base_of(folder, "float32")
    stage = apply("adapt.lora", base, tmp_path / "a", data=str(tiny_jsonl), **QUICK)
    assert stage.notes["adapter"]["reached_share"] > 0.98
    learned = {k: v for k, v in load_file(stage.adapter / "adapter_model.safetensors").items() if "lora_B" in k}
    assert [k for k in learned if "expert" in k or "input_linear" in k]
    assert all(v.any() for v in learned.values()), "a part of the adapter that begins at zero was never changed"
    with stage.open("cpu") as loaded:
        ours = logits_of(loaded.module, IDS)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), stage.adapter)
    assert torch.equal(ours, logits_of(plain.eval(), IDS))
    merged = apply("adapt.merge", stage, tmp_path / "m", window=32, tokens=64)
    module = AutoModelForCausalLM.from_pretrained(merged.weights, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(module, IDS), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", ["dbrx"], indirect=True)
def test_experts_that_no_adapter_reaches_are_told(folder, tiny_jsonl, tmp_path, capsys):
    """Two layers: attention 64 x 128 + 64 x 64 = 12288, router 256, experts 3 x 4 x 32 x 64 = 24576."""
    stage = apply("adapt.lora", base_of(folder, "float32"), tmp_path / "a", data=str(tiny_jsonl), **QUICK)
    share = round((12288 + 256) / (12288 + 256 + 24576), 4)
    assert stage.notes["adapter"]["reached_share"] == share
    assert stage.notes["adapter"]["left_out"] == {"DbrxExpertGLU": pytest.approx(1 - share, abs=1e-4)}
    assert "the adapter reaches 33.8% of the weights of the blocks; left as they are: DbrxExpertGLU 66.2%" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}], ids=str
)
@pytest.mark.parametrize("folder", ["granitemoe"], indirect=True)
def test_what_peft_does_not_do_to_experts_is_refused_by_name(folder, tiny_jsonl, tmp_path, settings):
    name = next(iter(settings))
    with pytest.raises(UserError, match=rf"^{name} .*: the experts of GraniteMoeForCausalLM are one tensor"):
        apply("adapt.lora", base_of(folder), tmp_path / "a", data=str(tiny_jsonl), **QUICK, **settings)


def test_packed_weights_are_counted_as_what_they_stand_for(tiny_llama, tmp_path):
    """A Llama of two blocks: q, o 64 x 64; k, v 64 x 32; gate, up, down 64 x 128."""
    from peft import LoraConfig, get_peft_model

    base = base_of(tiny_llama)
    for stage in (base, apply("quantize.bnb", base, tmp_path / "4"), apply("quantize.rtn", base, tmp_path / "r")):
        with stage.open("cpu") as loaded:
            weights = weights_of(loaded.module)
            assert sum(count for count, _ in weights.values()) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
            assert not expert_stacks(loaded.module)
            model = get_peft_model(loaded.module, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
            notes = reached(model, weights)
            assert notes["parameters"] == 2 * 2 * (64 + 64 + 64 + 32)
            assert notes["reached_share"] == round((64 * 64 + 64 * 32) / (3 * 64 * 64 + 3 * 64 * 128), 4)
            assert sentence(notes).startswith(
                "the adapter reaches 16.7% of the weights of the blocks; left as they are"
            )

"""adapt.merge: the merged model is "base + adapter", and what was lost is measured."""

import json

import pytest
import torch
from helpers import adapted_by_chance, apply, base_of, logits_of, some_ids

from llmq import plugin
from llmq.errors import UserError

LORA = {"r": 4, "max_length": 64, "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    "settings", [None, *(pytest.param({"bits": n}, marks=pytest.mark.slow) for n in (4, 8))], ids=str
)
def test_a_merged_model_opens_in_plain_transformers_and_says_nearly_the_same(
    tiny_llama, tiny_jsonl, tmp_path, settings
):
    from transformers import AutoModelForCausalLM

    stage = base_of(tiny_llama)
    if settings:
        stage = apply("quantize.bnb", stage, tmp_path / "q", **settings)
    adapted = apply("adapt.lora", stage, tmp_path / "a", data=str(tiny_jsonl), **LORA)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=256)

    assert "quantization_config" not in json.loads((merged.weights / "config.json").read_text())
    assert (merged.adapter, merged.packed) == (None, False)
    lost = {m.metric: m for m in merged.measurements}
    assert 0 <= lost["kl_divergence"].value < 0.02
    assert lost["top1_agreement"].value > 0.8
    assert lost["kl_divergence"].n == 8

    plain = logits_of(AutoModelForCausalLM.from_pretrained(merged.weights, dtype=torch.bfloat16).eval(), some_ids())
    with merged.open("cpu") as loaded:
        assert torch.equal(logits_of(loaded.module, some_ids()), plain)


@pytest.mark.slow
def test_merging_is_exact_in_float32(tiny_llama, tiny_jsonl, tmp_path):
    adapted = apply("adapt.lora", base_of(tiny_llama, "float32"), tmp_path / "a", data=str(tiny_jsonl), **LORA)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64)
    with adapted.open("cpu") as before, merged.open("cpu") as after:
        torch.testing.assert_close(
            logits_of(after.module, some_ids()), logits_of(before.module, some_ids()), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_the_divergence_is_that_of_a_slow_obvious_sum(tiny_llama, tiny_jsonl, tmp_path):
    from llmq.data.pydoc import Pydoc
    from llmq.text.windows import windows_of

    adapted = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **LORA)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=16, tokens=32)
    text = "".join(row["text"] for row in Pydoc().read().held_out)
    total, tokens = 0.0, 0
    with adapted.open("cpu") as a, merged.open("cpu") as b:
        for window in windows_of(text, a.processor, 16, 2):
            ids = torch.tensor([window.tokens.ids])
            p, q = (logits_of(x.module, ids)[0].double().softmax(-1) for x in (a, b))
            for i in range(len(window.tokens) - 1):
                total += float(sum(p[i] * (p[i] / q[i]).log()))
                tokens += 1
    assert merged.measurements[0].value == pytest.approx(total / tokens, rel=1e-2, abs=1e-7)


@pytest.mark.parametrize(
    "packs",
    [
        {"quantize.rtn": {"bits": 4, "group_size": 32}},
        pytest.param({"quantize.bnb": {"bits": 4}}, marks=pytest.mark.slow),
    ],
)
def test_a_sum_is_rounded_again_and_the_loss_of_it_is_measured(packs, tiny_llama, tiny_jsonl, tmp_path):
    ((word, settings),) = packs.items()
    packed = apply(word, base_of(tiny_llama), tmp_path / "p", **settings)
    adapted = apply("adapt.lora", packed, tmp_path / "a", data=str(tiny_jsonl), **LORA)
    data = {"file": {"path": str(tiny_jsonl)}}
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=16, tokens=64, into="gptq", data=data)
    assert merged.packed
    assert not merged.adapter
    made = json.loads((merged.weights / "config.json").read_text())["quantization_config"]
    assert (made["bits"], made["group_size"]) == (4, settings.get("group_size", 64))
    assert not (merged.weights / ".floats").exists()
    floats = apply("adapt.merge", adapted, tmp_path / "f", window=16, tokens=64, data=data)
    assert merged.measurements[0].value > floats.measurements[0].value
    with merged.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()


def test_a_step_after_a_merge_into_gptq_finds_packed_weights(tmp_path):
    from llmq.recipe import Source, check_order

    steps = [plugin.build({"adapt.lora": {"data": "pydoc"}}), plugin.build({"adapt.merge": {"into": "gptq"}})]
    after = plugin.build("quantize.rtn")
    with pytest.raises(UserError, match=r"quantize\.rtn"):
        check_order("causal-lm", [*steps, after], Source("here", {}))


WHOLE = {"modules_to_save": ["input_layernorm", "lm_head"], "target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize(
    ("packs", "settings", "dtype"),
    [
        ({}, {}, None),
        ({}, WHOLE, "float32"),
        pytest.param({}, {"use_dora": True}, "float16", marks=pytest.mark.slow),
        pytest.param({"quantize.bnb": {"bits": 4}}, {}, None, marks=pytest.mark.slow),
        ({"quantize.rtn": {"bits": 4, "group_size": 32}}, {"use_dora": True}, None),
    ],
    ids=str,
)
def test_block_by_block_writes_what_the_whole_model_would_be(packs, settings, dtype, tiny_llama, tmp_path):
    from llmq.text.bnb_layers import dequantized
    from llmq.text.names import untie
    from llmq.text.opening import as_opened_in, load_causal_lm, with_adapter

    stage = base_of(tiny_llama)
    for word, its in packs.items():
        stage = apply(word, stage, tmp_path / "q", **its)
    adapted = adapted_by_chance(stage, tmp_path / "a", **settings)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64, dtype=dtype)
    whole = load_causal_lm(adapted.weights, "float32", "cpu")
    whole = dequantized(whole) if packs else whole
    untie(whole)
    whole = with_adapter(whole, adapted.adapter).merge_and_unload(safe_merge=True)
    as_opened_in(getattr(torch, dtype or "bfloat16"), whole)
    with merged.open("cpu") as loaded:
        made, meant = loaded.module.state_dict(), whole.state_dict()
    assert made.keys() == meant.keys()
    for name, tensor in meant.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name
    assert len(merged.weight_files()) == 3  # of two blocks, and of the rest


def test_a_merge_that_the_disk_does_not_hold_is_told(tiny_llama, tmp_path, monkeypatch):
    from llmq.errors import LlmqError
    from llmq.text import merging

    adapted, written = adapted_by_chance(base_of(tiny_llama), tmp_path / "a"), merging.write

    def spoilt(tensors, file):
        name = "model.layers.1.mlp.down_proj.weight"
        written({k: t * 2 if k == name else t for k, t in tensors.items()}, file)

    monkeypatch.setattr(merging, "write", spoilt)
    with pytest.raises(LlmqError, match=r"does not hold the model .*: model.layers.1.mlp.down_proj.weight differs"):
        apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64)


@pytest.mark.parametrize("asked", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_what_was_pruned_stays_zero_unless_asked_otherwise(tiny_llama, tiny_jsonl, tmp_path, asked):
    pruned = apply("prune.magnitude", base_of(tiny_llama), tmp_path / "p", sparsity=0.5)
    adapted = apply("adapt.lora", pruned, tmp_path / "a", data=str(tiny_jsonl), **LORA)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64, keep_sparsity=asked)

    def zeros(stage):
        with stage.open("cpu") as loaded:
            layer = loaded.module.get_submodule("model.layers.0.mlp.down_proj")
            return int((layer.weight == 0).sum())

    assert (zeros(merged) >= zeros(pruned)) == (asked is None)

"""Exports to GGUF: blocks, architectures, tokenizers, types by tensor, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_text_models
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from helpers import CPU, adapted_by_chance, apply, base_of, logits_of, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import llmq
from llmq import pipeline, plugin, targets
from llmq.artifact import Artifact
from llmq.cli import app
from llmq.errors import LlmqError, UserError
from llmq.files import write_json
from llmq.matrix.gguf_blocks import KINDS, carried
from llmq.matrix.grid import Quantized, round_to_nearest
from llmq.text import decoding
from llmq.text.gguf import types as gguf_types
from llmq.text.gguf.layout import ARCHITECTURES
from llmq.text.gguf.metadata import restore
from llmq.text.gguf.tokenizer import SAMPLES, check_make, splitting
from llmq.text.tokenizer import end_marks

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = some_ids()


def values_of(rows: torch.Tensor, name: str) -> torch.Tensor:
    """The weights of rows in blocks, by the package gguf."""
    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[name]))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, -1]),
    sym=st.booleans(),
    outputs=st.integers(1, 5),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_a_grid_is_carried_without_another_rounding(bits, group, sym, outputs, blocks, scale, seed):
    weight = torch.randn(outputs, 64 * blocks, generator=torch.Generator().manual_seed(seed)) * scale
    made = round_to_nearest(weight, bits, group, sym)
    for name, kind in KINDS.items():
        kept = carried(made, name)
        if kept is None:
            continue
        again, meant = values_of(kept.rows, name), made.weight()
        if kept.distance == 0:
            assert torch.equal(again, meant)
        assert kind.has_minimum or kept.distance == 0
        # A minimum is rounded to float16: of at most 15 steps, by at most 2^-11 of them, but for the smallest numbers.
        steps = made.scales.float()[made.g_idx.long()].t()
        assert ((again - meant).abs() <= steps * max(kept.distance * 1.01, 0)).all()
        assert kept.distance <= 0.01 or scale < 1
    fits = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 8: "Q8_0"}[bits]
    if sym:
        assert carried(made, fits) is not None
    elif bits <= 4:
        assert carried(made, "Q4_1") is not None
        assert carried(made, "Q5_0") is not None  # exactly, where Q4_1 rounds the minimum


@pytest.mark.parametrize(("inputs", "group"), [(48, 16), (48, 48), (40, -1)])
def test_blocks_that_cross_groups_are_not_carried(inputs, group):
    made = round_to_nearest(torch.randn(2, inputs), 4, group, True)
    assert all(carried(made, name) is None for name in KINDS)


def test_groups_in_another_order_are_not_carried_and_float16_bounds_scales():
    made = round_to_nearest(torch.randn(2, 64), 4, 32, True)
    swapped = Quantized(made.codes, made.scales, made.zeros, made.g_idx.flip(0), 4)
    assert carried(swapped, "Q4_0") is not None  # whole blocks have a group each
    mixed = Quantized(made.codes, made.scales, made.zeros, made.g_idx.view(2, 32).t().flatten(), 4)
    assert carried(mixed, "Q4_0") is None
    assert carried(Quantized(made.codes, made.scales * 1e9, made.zeros, made.g_idx, 4), "Q4_0") is None


ROPE = {"rope_theta": 10000.0}
LINEAR = {**ROPE, "rope_type": "linear", "factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "llama": {
        "rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "attention_bias": True,
    },
    "phi3": {"rope_parameters": {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                                 "original_max_position_embeddings": 64},
             "original_max_position_embeddings": 64},
    "qwen2": {"rope_parameters": YARN},
    "qwen3": {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    "qwen3_moe": {"norm_topk_prob": True},
}  # fmt: skip


QUICK = ("gemma3_text", "gpt2", "llama", "phi3", "qwen3_moe")
"""The architectures with the most ways of their own; the others are tried by the slow tests."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_each_architecture_answers_from_its_file_as_before(name, tiny_llama, tmp_path):
    base = base_of(tiny_text_models.build(name, tmp_path / name, tiny_llama, **SPECIAL.get(name, {})), "float32")
    stage = apply("export.gguf", base, tmp_path / "made")
    assert stage.runtime == "gguf"
    with base.open("cpu") as before, stage.open("cpu") as after:
        # The base with the weights of the file answers as the file does: only float16 moved them.
        state = after.module.state_dict()
        for key, weight in before.module.state_dict().items():
            assert (state[key] - weight).abs().max() <= 2**-11 * weight.abs().max() + 1e-7, key
        before.module.load_state_dict(state)
        assert torch.allclose(logits_of(before.module, IDS), logits_of(after.module, IDS), rtol=0, atol=1e-5)
        for text in SAMPLES:
            assert before.processor(text).input_ids == after.processor(text).input_ids
    assert stage.bytes_on_disk == (stage.weights / "model.gguf").stat().st_size
    assert stage.notes["logits_apart"] < 1e-3


def test_the_file_names_what_engines_need(tiny_llama, tmp_path):
    stage = apply("export.gguf", base_of(tiny_llama), tmp_path / "made")
    held = {name: field.contents() for name, field in GGUFReader(stage.weights / "model.gguf").fields.items()}
    assert held["general.architecture"] == "llama"
    assert held["tokenizer.ggml.pre"] == "gpt-2"
    assert len(held["tokenizer.ggml.tokens"]) == held["llama.vocab_size"]
    assert held["tokenizer.ggml.tokens"][held["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert not held["tokenizer.ggml.add_bos_token"]
    assert held["tokenizer.chat_template"] == tiny_text_models.CHATML
    assert {held["tokenizer.ggml.token_type"][i] for i in range(3)} == {3}  # control
    assert held["general.file_type"] == 1  # F16


def stored(stage: Artifact) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(stage.weights / "model.gguf").tensors}


EASY = ("4 bits", "4 bits, asymmetric", "8 bits")
GRIDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "4 bits": ("quantize.rtn", {}, "auto", "Q4_0"),
    "4 bits, asymmetric": ("quantize.rtn", {"sym": False}, "auto", "Q4_1"),
    "4 bits, asymmetric, exact": ("quantize.rtn", {"sym": False}, "q5_0", "Q5_0"),
    "3 bits": ("quantize.rtn", {"bits": 3, "group_size": 32, "sym": True}, "auto", "Q4_0"),
    "8 bits": ("quantize.rtn", {"bits": 8}, "auto", "Q8_0"),
    "whole rows": ("quantize.rtn", {"group_size": -1}, "auto", "Q4_0"),
    "calibrated": ("quantize.gptq", {"samples": 2, "length": 32}, "auto", "Q4_0"),
}


@pytest.mark.parametrize("case", [c if c in EASY else pytest.param(c, marks=pytest.mark.slow) for c in GRIDS])
def test_a_quantized_stage_keeps_its_grid(case, tiny_llama, tmp_path):
    word, said, wanted, expected = GRIDS[case]
    stage = apply(word, base_of(tiny_llama, "float32"), tmp_path / "packed", **said)
    made = apply("export.gguf", stage, tmp_path / "made", type=wanted)
    assert {kind for name, kind in stored(made).items() if ".attn_" in name or ".ffn_" in name} - {"F32"} == {expected}
    assert made.notes["grids_kept"] == 14
    with stage.open("cpu") as before, made.open("cpu") as after:
        apart = (logits_of(before.module, IDS) - logits_of(after.module, IDS)).abs().max()
    # The embeddings stay float16 and the grid as it is; Q8_0 embeddings are no part of `auto`.
    assert apart < (0.02 if expected == "Q4_1" else 1e-4 if wanted == "auto" else 1)
    assert made.bytes_on_disk < stage.bytes_on_disk * 1.1


def test_settings_by_layer_become_types_by_tensor(tiny_llama, tmp_path):
    modules = {"down_proj": {"bits": 8}, "lm_head": {"bits": 4}, "layers.0.self_attn": "skip"}
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", modules=modules)
    held = stored(apply("export.gguf", stage, tmp_path / "made"))
    assert held["blk.0.attn_q.weight"] == "F16"
    assert held["blk.1.attn_q.weight"] == "Q4_0"
    assert held["blk.1.ffn_down.weight"] == "Q8_0"
    assert held["output.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("word", "said", "why"),
    [
        ("quantize.bnb", {}, "weights of bitsandbytes, which lie on no such grid"),
        ("quantize.rtn", {"bits": 8, "sym": False}, "8 bits with zeros that no type of blocks has"),
        pytest.param(
            "quantize.gptq",
            {"samples": 2, "length": 32, "static_groups": False},
            "groups in the order of activations",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_grid_without_a_type_is_dequantized_and_the_notes_say_so(word, said, why, tiny_llama, tmp_path):
    stage = apply(word, base_of(tiny_llama, "float32"), tmp_path / "packed", **said)
    made = apply("export.gguf", stage, tmp_path / "made")
    assert set(made.notes["not_kept"]) == {why}
    with stage.open("cpu") as before, made.open("cpu") as after:
        apart = (logits_of(before.module, IDS) - logits_of(after.module, IDS)).abs().max()
    assert apart < 0.02


RARE = [pytest.param(name, marks=pytest.mark.slow) for name in ("f16", "q8_0", "q4_0", "q5_0", "q5_1")]


@pytest.mark.parametrize("wanted", ["bf16", "q4_1", *RARE])
def test_floats_become_the_type_that_is_asked_for(wanted, tiny_llama, tmp_path):
    held = stored(apply("export.gguf", base_of(tiny_llama), tmp_path / "made", type=wanted))
    assert held["blk.0.attn_q.weight"] == wanted.upper()
    assert held["blk.0.attn_norm.weight"] == "F32"
    assert held["output.weight"] == ("Q8_0" if wanted[:2] in ("q4", "q5") else wanted.upper())


def test_weights_beyond_float16_become_bfloat16(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(tiny_llama)
    module.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6
    module.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "wide")
    held = stored(apply("export.gguf", base_of(tmp_path / "wide"), tmp_path / "made"))
    assert (held["blk.0.ffn_down.weight"], held["blk.1.ffn_down.weight"]) == ("BF16", "F16")


def test_a_file_that_does_not_read_back_is_an_error_and_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    real = gguf_types.encoded

    def broken(place: Any, *more: Any) -> np.ndarray:
        array = real(place, *more)
        if place.name == "blk.1.ffn_up.weight":
            array[0, 0] += 1
        return array

    monkeypatch.setattr(gguf_types, "encoded", broken)
    step: Any = plugin.build("export.gguf")
    with pytest.raises(LlmqError, match=r"blk\.1\.ffn_up\.weight as F16 was read back further away than its rounding"):
        pipeline.export(base_of(tiny_llama), step, tmp_path / "made", CPU)
    assert not list(tmp_path.iterdir())


THETA = {"rope_theta": 500000.0}
OF_LLAMA3 = {**THETA, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", OF_LLAMA3),
        ("llama", LINEAR),
        pytest.param("qwen2", YARN, marks=pytest.mark.slow),
        pytest.param("phi3", SPECIAL["phi3"]["rope_parameters"], marks=pytest.mark.slow),
        pytest.param("phi3", {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}, marks=pytest.mark.slow),
        ("llama", {**OF_LLAMA3, "original_max_position_embeddings": 64}),
    ],
)
def test_a_file_alone_is_opened_with_its_rotary_positions_scaled(name, rope, tiny_llama, tmp_path):
    base = base_of(tiny_text_models.build(name, tmp_path / name, tiny_llama, rope_parameters=rope), "float32")
    file = apply("export.gguf", base, tmp_path / "made").weights / "model.gguf"
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(file, tmp_path / "alone" / "its.gguf")
    if rope.get("original_max_position_embeddings") == 64 and rope["rope_type"] == "llama3":
        with pytest.raises(UserError, match="and not as those of Llama 3, which is not read"):
            base_of(alone, "float32")
        return
    ids = some_ids(1, 100)
    with base.open("cpu") as before, base_of(alone, "float32").open("cpu") as after:
        meant, found = (logits_of(loaded.module, ids) for loaded in (before, after))
    assert (found - meant).norm() < 0.01 * meant.norm()


def test_of_a_gemma_alone_queries_caps_and_local_positions_are_those_of_the_file(tiny_llama, tmp_path):
    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    gemma2 = tiny_text_models.build("gemma2", tmp_path / "2", tiny_llama, **SPECIAL["gemma2"], **caps)
    both = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}
    gemma3 = {**SPECIAL["gemma3_text"], "num_hidden_layers": 6, "rope_parameters": both}
    gemma3 = tiny_text_models.build("gemma3_text", tmp_path / "3", tiny_llama, **gemma3)
    for folder, wanted in ((gemma2, {"query_pre_attn_scalar": 16, **caps}), (gemma3, {"rope_parameters": both})):
        made = apply("export.gguf", base_of(folder, "float32"), folder.with_suffix(".made")).weights
        config = AutoConfig.from_pretrained(made, gguf_file="model.gguf")
        restore(made / "model.gguf", config)
        assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("opt", {}, "is a opt; written as GGUF are gemma2, gemma3_text, gpt2, llama"),
        ("llama", {"hidden_act": "relu"}, "its activation is 'relu', and engines compute 'silu'"),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
            "positions are of type 'dynamic'",
        ),
        ("gemma2", {}, "query_pre_attn_scalar is 256, and engines take 16"),
        ("stablelm", {"qk_layernorm": True}, "its queries and keys are normalized"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("starcoder2", {"use_bias": False}, "its layers have no biases"),
        ("qwen2", {"head_dim": 32}, "its heads are 128 wide together .head_dim., and engines read 64"),
        ("stablelm", {"tie_word_embeddings": True}, "its output head is its embeddings"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate of its rotary positions is False"),
        ("gemma3_text", {**SPECIAL["gemma3_text"], "final_logit_softcapping": 30.0}, "its logits have a soft cap"),
        ("gemma3_text", {**SPECIAL["gemma3_text"], "use_bidirectional_attention": True}, "attend to later ones"),
        (
            "gemma3_text",
            {
                **SPECIAL["gemma3_text"],
                "rope_parameters": {"full_attention": {**ROPE, "rope_type": "default"}, "sliding_attention": LINEAR},
            },
            "layers with a window are of type 'linear'",
        ),
    ],
)
def test_a_network_that_engines_compute_otherwise_is_refused_before_anything_runs(
    name, changes, why, tiny_llama, tmp_path
):
    base = base_of(tiny_text_models.build(name, tmp_path / "model", tiny_llama, **changes))
    step: Any = plugin.build("export.gguf")
    with pytest.raises(UserError, match=why):
        step.check_base(base)


def test_of_a_network_that_sees_images_no_part_is_left_out_without_a_word(tiny_llama, tmp_path):
    from llmq.text.gguf import writing
    from llmq.text.graph import stage
    from llmq.text.opening import without_weights

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path)
    text = {**tiny_text_models.SHAPE, **SPECIAL["gemma3_text"], "head_dim": 16, "vocab_size": len(tokenizer)}
    seen = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    AutoConfig.for_model("gemma3", text_config=text, vision_config=seen).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no place in a GGUF file of a gemma3"):
        writing.check(tmp_path)
    told = stage._notes(without_weights(tmp_path), {}, [])
    assert told["left_out"] == "vision_config of gemma3: the graph holds the language model alone"
    assert "left_out" not in stage._notes(without_weights(tiny_llama), {}, [])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str, **more: Any) -> dict[str, Any]:
    last = {"type": "ByteLevel", "use_regex": False}
    pre = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}, last]}
    return {"pre_tokenizer": pre, "model": more}


def test_a_splitting_has_the_name_that_engines_know():
    digits = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
    }
    assert splitting({"pre_tokenizer": {"type": "ByteLevel"}, "model": {}}, Path()) == "gpt-2"
    assert splitting({"pre_tokenizer": digits, "model": {}}, Path()) == "smollm"
    assert splitting(split_by(LLAMA3, ignore_merges=True), Path()) == "llama-bpe"
    assert splitting(split_by(LLAMA3), Path()) == "dbrx"
    assert splitting(split_by(LLAMA3.replace("{1,3}", "")), Path()) == "qwen2"
    with pytest.raises(UserError, match="for which engines have no name that is known here; known are gpt-2, smollm"):
        splitting(split_by("[a-z]+"), Path("there"))


@pytest.mark.parametrize(
    "rewritten", ["NFKC()", "Lowercase()", "Replace('``', '\"')", "Sequence([NFD(), StripAccents()])"]
)
def test_a_tokenizer_that_rewrites_texts_is_refused_before_a_run_as_engines_do_not(rewritten, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.normalizer = normalizers.NFC()  # as Qwen has it, and engines leave it out
    check_make(SimpleNamespace(backend_tokenizer=bpe), tmp_path)
    bpe.normalizer = eval(rewritten, vars(normalizers))
    with pytest.raises(UserError, match="rewrites texts before it cuts them"):
        check_make(SimpleNamespace(backend_tokenizer=bpe), tmp_path)


def test_an_export_by_command_is_checked_as_one_of_a_recipe(tiny_llama, tmp_path):
    folder = tiny_text_models.build("qwen2", tmp_path / "model", tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    step: Any = plugin.build("export.gguf")
    with pytest.raises(UserError, match="has 401 tokens and the model 400 embeddings, none for '<pad>'"):
        pipeline.export(base_of(folder), step, tmp_path / "made", CPU)


def sentencepiece_like(folder: Path) -> None:
    """A tokenizer as Llama 2 has one: characters, bytes for others, words that begin with a low line."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=marks, show_progress=False)
    bpe.train_from_iterator([topics["compound"][:20000]], trainer)
    held = json.loads(bpe.to_str())["model"]
    LlamaTokenizer(vocab=held["vocab"], merges=[tuple(m) for m in held["merges"]]).save_pretrained(folder)


def test_a_tokenizer_of_sentencepiece_is_carried(tiny_llama, tmp_path):
    tiny_text_models.build("llama", tmp_path / "model", tiny_llama)
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    sentencepiece_like(tmp_path / "model")
    stage = apply("export.gguf", base_of(tmp_path / "model"), tmp_path / "made")
    held = {name: field.contents() for name, field in GGUFReader(stage.weights / "model.gguf").fields.items()}
    assert held["tokenizer.ggml.model"] == "llama"
    types = held["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert held["tokenizer.ggml.bos_token_id"] == 1
    assert held["tokenizer.ggml.add_space_prefix"]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "quantize.bnb", "quantize.rtn", "prune.magnitude"])
@pytest.mark.parametrize("to", ["gguf", "openvino"])
def test_an_adapter_is_merged_before_an_export_and_it_is_said(before, to, tiny_llama, tmp_path, capsys):
    base = base_of(tiny_llama, "float32")
    below = apply(before, base, tmp_path / "below") if before else base
    stage = adapted_by_chance(below, tmp_path / "stage")
    stage.save(stage.adapter)
    made = llmq.export(tmp_path / "stage", to, out=tmp_path / "made")
    said = capsys.readouterr().err
    assert re.search(r"the adapter is merged first\n(.*\n)+  kl divergence [\d.e-]+ nats", said)
    assert made.history == (*stage.history, "adapt.merge", f"export.{to}")
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith(".")) == []
    exact = Artifact(made.model, made.weights, runtime=made.runtime)
    with stage.open("cpu") as adapted, exact.open("cpu") as merged, below.open("cpu") as plain:
        meant, found, without = (logits_of(each.module, IDS).float() for each in (adapted, merged, plain))
    moved = (meant - without).norm()
    # Merging keeps what was pruned: the line above says how much that is.
    assert (found - meant).norm() < (1 if before == "prune.magnitude" else 0.05) * moved


RUN = ["size", "perplexity", "lm_eval", "speed"]


@pytest.mark.slow
def test_a_run_with_an_export_is_measured_verified_and_evaluated_again(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        f"model: {{causal_lm: {{weights: {tiny_llama}}}}}\n"
        "steps:\n- quantize.rtn: {}\n- export.gguf\n"
        "evaluate: [size, {perplexity: {data: pydoc, limit: 2, window: 64}}, {divergence: {limit: 2, window: 64}}]\n"
    )
    ran = CliRunner().invoke(app, ["run", "job.yaml", "--out", "run"])
    assert ran.exit_code == 0, ran.output
    stage = json.loads(Path("run/report.json").read_text())["stages"][2]
    assert (stage["step"], stage["stored"]) == ("export.gguf", "Q4_0 and float16")
    file = Path("run/2-export.gguf/model.gguf")
    assert CliRunner().invoke(app, ["verify", "run"]).exit_code == 0
    Path("suite.yaml").write_text("- size\n- perplexity: {data: pydoc, limit: 2, window: 64}\n")
    for target, out in (("run/2-export.gguf", "of-stage"), (str(file), "of-file")):
        asked = CliRunner().invoke(app, ["eval", target, "--suite", "suite.yaml", "--out", out])
        assert asked.exit_code == 0, asked.output
    told = CliRunner().invoke(app, ["compare", "of-stage", "of-file", "--json"])
    assert told.exit_code == 0, told.output
    ratios = {c["metric"]: c["ratio"] for c in json.loads(told.stdout)["comparisons"]}
    assert ratios["bytes_on_disk"] == 1  # of the file, not of the floats that it was dequantized to
    assert ratios["token_perplexity"] == pytest.approx(1, abs=0.01)
    shutil.copy(file, "theirs.Q4_0.gguf")
    told = CliRunner().invoke(app, ["compare", "run/1-quantize.rtn", "theirs.Q4_0.gguf", "--json", "--out", "beside"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["results"] == ["1-quantize.rtn", "2-theirs.Q4_0"]
    sizes = {m["result"]: m["value"] for m in found["measurements"] if m["metric"] == "bytes_on_disk"}
    assert sizes["2-theirs.Q4_0"] == Path("theirs.Q4_0.gguf").stat().st_size
    pairs = {(c["task"], c["metric"]): c for c in found["comparisons"]}
    assert pairs["perplexity", "token_perplexity"]["ratio"] == pytest.approx(1, abs=0.01)
    assert pairs["perplexity", "token_perplexity"]["n"] == 2, "the windows pair"
    assert ("divergence", "kl_to_base") in pairs, "both beside the base of the run"
    assert json.loads(Path("beside/report.json").read_text())["recipe"]["targets"][1] == "theirs.Q4_0.gguf"


def test_a_model_is_compared_by_the_tasks_of_a_run(tiny_llama, tmp_path, llmq):
    """What has no tasks of its own needs a run, or is measured by the suite of its kind."""
    apply("quantize.rtn", base_of(tiny_llama), tmp_path / "stage")
    write_json(tmp_path / "results_x.json", {"results": {}, "versions": {}, "lm_eval_version": "0.4.13"})
    code, _, error = llmq("compare", "results_x.json", "stage")
    assert (code, error.count("\n")) == (2, 1)
    assert "'stage' is a model, and 'results_x.json' no run of a recipe" in error
    code, _, error = llmq("compare", "stag", "stage")
    assert (code, error.count("\n")) == (2, 1)
    assert "there is no run, stage or result file 'stag'" in error
    asked = targets.unmeasured(["stage", str(tiny_llama)], "causal_lm")
    assert list(asked.stages) == asked.compared == ["0-stage", f"1-{tiny_llama.name}"]
    assert [task.word for task in asked.tasks] == ["tasks.size", "tasks.perplexity", "tasks.lm_eval", "tasks.speed"]


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""The places of float16 scales in the blocks of some types; others have one at their beginning."""
FOREIGN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ4_XS")


def of_another_house(source: Path, file: Path) -> dict[str, np.ndarray]:
    """Write the file of a stage again with random blocks of types that llmq does not write; returns their values."""
    from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter

    reader, writer = GGUFReader(source), GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    random, values, kinds = np.random.default_rng(0), {}, list(FOREIGN)
    for tensor in reader.tensors:
        if kinds and ".ffn_" in tensor.name and len(tensor.shape) == 2:
            kind = GGMLQuantizationType[kinds.pop(0)]
            block, size = GGML_QUANT_SIZES[kind]
            rows, columns = tensor.data.shape
            blocks = random.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
            for place in SCALES.get(kind.name, (0,)):
                blocks[:, place : place + 2] = np.float16([0.001]).view(np.uint8)
            data = blocks.reshape(rows, -1)
            values[tensor.name] = dequantize(data, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_file_of_another_house_is_opened_whatever_its_types_and_measured_by_its_own_bytes(tiny_llama, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4}
    model = tiny_text_models.build("llama", tmp_path / "model", tiny_llama, **shape)
    stage = apply("export.gguf", base_of(model), tmp_path / "made")
    values = of_another_house(stage.weights / "model.gguf", tmp_path / "other-Q4_K_M.gguf")
    assert len(values) == len(FOREIGN)
    base = base_of(tmp_path / "other-Q4_K_M.gguf", "float32")
    assert base.bytes_on_disk == (tmp_path / "other-Q4_K_M.gguf").stat().st_size
    names = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
    with base.open("cpu") as loaded:
        state = loaded.module.state_dict()
        for name, meant in values.items():
            _, layer, leaf, _ = name.split(".")
            assert np.array_equal(state[f"model.layers.{layer}.mlp.{names[leaf]}.weight"].numpy(), meant), name
        figures = {m.metric: m.value for m in plugin.build("tasks.size").score(loaded)}
    assert figures["bytes_on_disk"] == base.bytes_on_disk
    assert 0 < figures["sparse_bytes"] <= figures["bytes_on_disk"]


@pytest.mark.parametrize(
    ("ends", "held", "left"), [([2], [2], None), ([1, 2], [2, 1], None), ([1, 3, 2, 5], [2, 1, 3], [5])]
)
def test_a_file_holds_each_token_that_ends_a_text_and_gives_them_back(ends, held, left, tiny_llama, tmp_path):
    """The tokenizer's own is `eos`; llama.cpp stops at `eot` and `eom` as well."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    write_json(model / "generation_config.json", {"eos_token_id": ends})
    stage = apply("export.gguf", base_of(model), tmp_path / "made")
    assert stage.notes.get("ends_left_out") == left
    fields = GGUFReader(stage.weights / "model.gguf").fields
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    assert [fields[key].contents() for key in keys if key in fields] == held
    shutil.copy(stage.weights / "model.gguf", tmp_path / "theirs.gguf")
    base = base_of(tmp_path / "theirs.gguf")
    assert end_marks(base.weights) == set(held)
    with base.open("cpu") as loaded:
        assert decoding.end_marks(loaded.module, loaded.processor) == set(held)

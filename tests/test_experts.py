"""Layers that are not `nn.Linear`: mixtures of experts and GPT-2's `Conv1D`, quantized, pruned and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted_by_chance, apply, base_of, logits_of, some_ids
from safetensors.torch import load_file

from llmq import plugin
from llmq.errors import UserError

IDS = some_ids()
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "intermediate_size": 64}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
FEW = {"samples": 4, "length": 32}
# What transformers calls it, its shape, a name of one expert's layer in its files, and how many layers a block has.
FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "mixtral": ({**SHAPE, "intermediate_size": 64, "num_local_experts": 4}, "block_sparse_moe.experts.3.w1", 4 + 12),
    "qwen2_moe": (
        {**SHAPE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
        "mlp.experts.3.gate_proj",
        4 + 12 + 3,
    ),
    "qwen3_moe": ({**SHAPE, **EXPERTS, "num_experts": 4, "head_dim": 16}, "mlp.experts.3.gate_proj", 4 + 12),
    "deepseek_v3": (
        {**SHAPE, **EXPERTS, **LATENT, **DEEPSEEK, "num_key_value_heads": 4, "num_local_experts": 4},
        "mlp.experts.3.gate_proj",
        5 + 12 + 3,
    ),
    "granitemoe": (
        {**SHAPE, "intermediate_size": 64, "num_local_experts": 4},
        "block_sparse_moe.experts.3.gate_proj",
        4 + 12,
    ),
    "gpt_oss": (
        {**SHAPE, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16},
        "mlp.experts.3.gate_proj",
        4 + 12,
    ),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, "attn.c_attn", 4),
}
QUICK = ("mixtral", "deepseek_v3", "gpt_oss", "gpt2")
FAMILY = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]


pytestmark = pytest.mark.usefixtures("one_thread")  # matrices of 64 columns are not worth a second


@pytest.fixture(scope="module")
def family(tiny_llama, tmp_path_factory) -> Callable[[str], Path]:
    """Tiny random models, no bias or buffer of theirs zero, made when they are first asked for."""
    root = tmp_path_factory.mktemp("experts")

    def model(name: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = root / name
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
            special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
            config = AutoConfig.for_model(
                name, vocab_size=416, max_position_embeddings=512, **special, **FAMILIES[name][0]
            )
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(config)
            for key, tensor in made.state_dict().items():
                if key.endswith("bias"):
                    tensor.normal_(std=0.1)
            made.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return model


def in_plain_transformers(folder: Path) -> torch.Tensor:
    """The float32 logits of a folder whose every tensor finds its place, and that lacks none."""
    from transformers import AutoModelForCausalLM

    module, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    return logits_of(module.eval(), IDS)


def opened(stage: Any) -> torch.Tensor:
    """The logits of a stage."""
    with stage.open("cpu") as loaded:
        return logits_of(loaded.module, IDS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def dense(packed: Path, folder: Path) -> Path:
    """The model that a packed folder stands for, in plain transformers' own names, unpacked by the format."""
    from safetensors.torch import save_file

    from llmq.matrix.gptq_format import from_tensors

    tensors = stored(packed)
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    for layer in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        four = {part: tensors.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = from_tensors(four, settings["bits"], settings["checkpoint_format"]).weight()
        tensors[f"{layer}.weight"] = (
            weight.t().contiguous() if config["model_type"] == "gpt2" and ".c_" in layer else weight.contiguous()
        )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PRUNINGS: dict[str, dict[str, Any]] = {
    "prune.magnitude": {},
    "prune.wanda": FEW,
    "prune.sparsegpt": FEW,
    "prune.alps": FEW,
}


@pytest.mark.slow
@pytest.mark.parametrize("word", PRUNINGS)
@pytest.mark.parametrize("name", FAMILY)
def test_each_expert_is_pruned_and_the_folder_opens_anywhere(name, word, family, tmp_path):
    folder = family(name)
    stage = apply(word, base_of(folder, "float32"), tmp_path / "p", **PRUNINGS[word])
    before, after = stored(folder), stored(stage.weights)
    assert before.keys() == after.keys()
    assert torch.equal(opened(stage), in_plain_transformers(stage.weights))
    zeros = {key: (tensor == 0).float().mean().item() for key, tensor in after.items()}
    experts = [key for key in after if "experts" in key and "shared" not in key and "bias" not in key]
    for key in experts or [key for key in after if ".c_" in key and after[key].ndim > 1]:
        assert zeros[key] == pytest.approx(0.5, abs=0.02), key
    untouched = [key for key, share in zeros.items() if share < 0.1]
    assert untouched
    for key in untouched:
        assert torch.equal(after[key], before[key]), key
    assert stage.notes["changed_share"] > 0.85


@pytest.mark.parametrize("word", ["quantize.rtn", pytest.param("quantize.gptq", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILY)
def test_each_expert_is_quantized_and_the_folder_opens_again(name, word, family, tmp_path):
    folder = family(name)
    more = FEW if word == "quantize.gptq" else {}
    stage = apply(word, base_of(folder, "float32"), tmp_path / "q", group_size=32, bits=8, **more)
    after = stored(stage.weights)
    assert any(f"{FAMILIES[name][1]}.qweight" in key for key in after)
    assert stage.notes["changed_share"] > 0.85
    made, base = opened(stage), in_plain_transformers(folder)
    assert ((made - base).norm() / base.norm()).item() < 0.03, "8 bits a weight lose little"
    assert not torch.equal(made, base)
    if name not in ("granitemoe", "gpt_oss"):  # whose files hold experts in one tensor
        torch.testing.assert_close(
            made, in_plain_transformers(dense(stage.weights, tmp_path / "d")), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_merging_over_packed_experts_gives_a_folder_that_opens_anywhere(name, family, tmp_path):
    stage = apply("quantize.rtn", base_of(family(name), "float32"), tmp_path / "q", group_size=32, bits=8)
    adapted = adapted_by_chance(stage, tmp_path / "a")
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64)
    assert stored(merged.weights).keys() == stored(family(name)).keys()
    torch.testing.assert_close(in_plain_transformers(merged.weights), opened(adapted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [None, pytest.param({"bits": 4}, marks=pytest.mark.slow), {"bits": 8}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_merging_over_float_and_bitsandbytes_weights_too(name, settings, family, tmp_path):
    stage = base_of(family(name), "float32")
    if settings:
        more = {"skip_modules": ["experts"]} if name == "mixtral" else {}
        more |= {"compute_dtype": "float32"} if settings["bits"] == 4 else {}
        stage = apply("quantize.bnb", stage, tmp_path / "q", **settings, **more)
    adapted = adapted_by_chance(stage, tmp_path / "a")
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64)
    assert stored(merged.weights).keys() == stored(family(name)).keys()
    # LLM.int8() rounds activations; 4 bits round their scales to bfloat16 where the processor repacks them.
    rounding = {None: 1e-3, 4: 1e-2, 8: 0.05}[settings and settings["bits"]]
    torch.testing.assert_close(in_plain_transformers(merged.weights), opened(adapted), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_bitsandbytes_refuses_to_leave_experts_in_float_unasked(name, family, tmp_path):
    base = base_of(family(name))
    step: Any = plugin.build({"quantize.bnb": {"bits": 4}})
    for ask in (lambda: step.check_base(base), lambda: apply("quantize.bnb", base, tmp_path / "q", bits=4)):
        with pytest.raises(UserError, match=rf"\({name}\).*Experts; quantize.gptq and quantize.rtn.*skip_modules"):
            ask()
    stage = apply("quantize.bnb", base, tmp_path / "s", bits=4, skip_modules=["experts"])
    assert 0 < stage.notes["changed_share"] < 0.7
    with stage.open("cpu") as loaded:
        ours = logits_of(loaded.module, IDS)
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_packs_every_conv1d(bits, family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = family("gpt2")
    stage = apply("quantize.bnb", base_of(folder, "bfloat16"), tmp_path / "q", bits=bits)
    assert stage.notes["quantized_layers"] == 8
    assert stage.notes["changed_share"] > 0.9
    made = opened(stage)
    assert torch.equal(made, logits_of(AutoModelForCausalLM.from_pretrained(stage.weights).eval(), IDS))
    base = in_plain_transformers(folder)
    assert ((made.float() - base).norm() / base.norm()).item() < (0.3 if bits == 4 else 0.05)


@pytest.mark.parametrize("word", ["quantize.gptq", "prune.wanda", "prune.sparsegpt", "prune.alps"])
def test_an_expert_that_no_token_comes_to_is_changed_by_its_weights_alone(word, family, tmp_path):
    settings = {"group_size": 32, "bits": 8} if word == "quantize.gptq" else {}
    folder = family("mixtral")
    stage = apply(word, base_of(folder, "float32"), tmp_path / "s", samples=1, length=1, **settings)
    assert stage.notes["layers_without_calibration"] >= 2 * 3 * 2, "one token comes to two of four experts a block"
    made, base = opened(stage), in_plain_transformers(folder)
    assert torch.isfinite(made).all()
    if settings:
        assert ((made - base).norm() / base.norm()).item() < 0.03
    else:
        zeros = [(t == 0).float().mean().item() for k, t in stored(stage.weights).items() if "experts" in k]
        assert zeros == pytest.approx([0.5] * len(zeros), abs=0.02)


@pytest.mark.slow
def test_a_killed_job_goes_on_through_the_experts_it_wrote(family, tmp_path):
    for name in ("mixtral", "gpt_oss", "gpt2"):
        whole = apply("prune.wanda", base_of(family(name), "float32"), tmp_path / name / "whole", **FEW)
        again = tmp_path / name / "again"
        again.mkdir()
        first = min(whole.weights.glob("model-*.safetensors"))
        (again / first.name).write_bytes(first.read_bytes())
        resumed = apply("prune.wanda", base_of(family(name), "float32"), again, **FEW)
        before, after = stored(whole.weights), stored(resumed.weights)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


@pytest.mark.parametrize("modules", [{"experts": "skip"}, {"experts.1.": "skip"}, {"layers.0.": "skip"}], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_experts_that_are_skipped_stay_as_they_were(name, modules, family, tmp_path):
    folder = family(name)
    stage = apply("quantize.rtn", base_of(folder, "float32"), tmp_path / "q", group_size=32, bits=8, modules=modules)
    made, base = opened(stage), in_plain_transformers(folder)
    assert 0 < ((made - base).norm() / base.norm()).item() < 0.03


def test_buffers_of_a_block_are_kept(family, tmp_path):
    stage = apply("prune.magnitude", base_of(family("deepseek_v3"), "float32"), tmp_path / "p")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = stored(family("deepseek_v3")), stored(stage.weights)
    assert before[key].any()
    assert torch.equal(after[key], before[key])

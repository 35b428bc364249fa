"""Every family of language models that people bring: quantized and pruned, opened again, and opened elsewhere."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import apply, base_of, logits_of, some_ids
from safetensors import safe_open
from safetensors.torch import save_file

from llmq.artifact import Artifact
from llmq.text.packed import packed_layers

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16}
SLIDING = {**GROUPED, "sliding_window": 16}
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
# What transformers calls it, its shape, and how many linear layers each of its blocks has.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", GROUPED, 7),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 64}, 6),
    "gpt_neox, parallel": ("gpt_neox", SHAPE, 4),
    "gpt_neox, one after the other": ("gpt_neox", {**SHAPE, "use_parallel_residual": False}, 4),
    "opt, projected": ("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, 6),
    "llama with biases": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, 7),
    "qwen2": ("qwen2", {**SHAPE, "num_key_value_heads": 2}, 7),
    "qwen2, sliding": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}, 7),
    "qwen3": ("qwen3", GROUPED, 7),
    "mistral": ("mistral", SLIDING, 7),
    "gemma2": ("gemma2", SLIDING, 7),
    "gemma3": ("gemma3_text", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}, 7),
    "phi": ("phi", SHAPE, 6),
}
FAMILIES["gemma3"][1]["num_hidden_layers"] = 4
QUICK = ("llama", "opt", "gpt_neox, parallel")
FAMILY = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]
PARTS = ("qweight", "qzeros", "scales", "g_idx")
FEW = {"samples": 4, "length": 32}
IDS = some_ids()


pytestmark = pytest.mark.usefixtures("one_thread")  # matrices of 64 columns are not worth a second


@pytest.fixture(scope="module")
def family(tiny_llama, tmp_path_factory) -> Callable[..., Path]:
    """Tiny random models of every family, no bias of theirs zero, made when they are first asked for."""
    root = tmp_path_factory.mktemp("families")

    def model(name: str, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = root / "-".join([name, *changes])
        if not folder.exists():
            word, shape, _ = FAMILIES[name]
            tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
            special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
            config = AutoConfig.for_model(word, vocab_size=416, max_position_embeddings=512, **special, **shape)
            config.update(changes)
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(config)
            for key, tensor in made.named_parameters():
                if key.endswith("bias"):
                    tensor.data.normal_(std=0.1)
            made.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return model


def opened(stage: Artifact) -> Any:
    """The module of a stage."""
    return stage.model.open(stage, "cpu").module


def in_plain_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The logits of a folder whose every tensor plain transformers finds its place for, and that lacks none."""
    from transformers import AutoModelForCausalLM

    module, said = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(said.values()), said
    return logits_of(module.eval(), IDS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors of a folder, each of them there once."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as file_opened:
            more = {key: file_opened.get_tensor(key) for key in file_opened.keys()}  # noqa: SIM118
        assert not tensors.keys() & more.keys()
        tensors |= more
    return tensors


def linears(module: Any) -> set[str]:
    """The names of a model's linear layers inside its blocks."""
    return {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The stream of `bits` along the last dimension of int32 words, bit by bit."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits)))


def unpacked(tensors: dict[str, torch.Tensor], layer: str, lacking: int) -> torch.Tensor:
    """The float weight `[outputs, inputs]` of a packed layer, by the definition of the format."""
    words, zeros, scales, g_idx = (tensors[f"{layer}.{part}"] for part in PARTS)
    bits, groups = len(words) * 32 // len(g_idx), g_idx.long()
    return (codes(words.t(), bits) - lacking - codes(zeros, bits)[groups].t()) * scales[groups].t().float()


def dense(packed: Path, folder: Path) -> Path:
    """The model that a packed folder stands for, unpacked in float32 for plain transformers."""
    tensors = stored(packed)
    layers = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    state = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(PARTS)}
    config = json.loads((packed / "config.json").read_text())
    lacking = {"gptq": 1, "gptq_v2": 0}[config.pop("quantization_config")["checkpoint_format"]]
    state |= {f"{layer}.weight": unpacked(tensors, layer, lacking).contiguous() for layer in layers}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_packed_right(folder: Path, tmp_path: Path) -> None:
    """A packed folder gives the logits of what its files stand for, and in bfloat16 as near to them as a dense one."""
    like = dense(folder, tmp_path / "dense")
    exact, rounded = in_plain_transformers(like, torch.float32), in_plain_transformers(like)
    ours, ours_rounded = (logits_of(opened(base_of(folder, dtype)), IDS) for dtype in ("float32", "bfloat16"))
    assert torch.isfinite(ours_rounded).all()
    assert torch.allclose(ours, exact, rtol=0, atol=1e-5)
    assert (ours_rounded - exact).square().mean() < 2 * (rounded - exact).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["quantize.gptq", "quantize.rtn"])
@pytest.mark.parametrize("name", FAMILY)
def test_a_family_is_quantized_and_opened_again(name, word, family, tiny_jsonl, tmp_path):
    like = family(name)
    more = {"data": str(tiny_jsonl), **FEW} if word == "quantize.gptq" else {}
    stage = apply(word, base_of(like), tmp_path / "q", group_size=32, **more)
    module = opened(stage)
    of_packed = set(packed_layers(module))
    assert {n for n, m in module.named_modules() if m in of_packed} == linears(module)
    assert len(of_packed) == stage.notes["quantized_layers"] == module.config.num_hidden_layers * FAMILIES[name][2]
    before, after = stored(like), stored(stage.weights)
    assert before.keys() - after.keys() == {f"{layer}.weight" for layer in linears(module)}
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key]), "what is not quantized stays as it was"
    assert_packed_right(stage.weights, tmp_path)


PRUNINGS: dict[str, dict[str, Any]] = {
    "prune.magnitude": {"sparsity": 0.3},
    "prune.wanda": {"sparsity": 0.5, **FEW},
    "prune.sparsegpt": {"pattern": "2:4", **FEW},
}


@pytest.mark.parametrize("word", PRUNINGS)
@pytest.mark.parametrize("name", FAMILY)
def test_a_family_is_pruned_and_opened_anywhere(name, word, family, tiny_jsonl, tmp_path):
    like, settings = family(name), PRUNINGS[word]
    more = {"data": str(tiny_jsonl)} if "samples" in settings else {}
    stage = apply(word, base_of(like), tmp_path / "p", **settings, **more)
    module = opened(stage)
    made, layers = logits_of(module, IDS), linears(module)
    assert torch.isfinite(made).all()
    assert torch.equal(made, in_plain_transformers(stage.weights))
    assert len(layers) == stage.notes["pruned_layers"] == module.config.num_hidden_layers * FAMILIES[name][2]
    before, after = stored(like), stored(stage.weights)
    assert before.keys() == after.keys()
    for key in before:
        if key.removesuffix(".weight") in layers:
            assert (after[key] == 0).float().mean().item() == pytest.approx(settings.get("sparsity", 0.5), abs=0.01)
        else:
            assert torch.equal(after[key], before[key]), "what is not pruned stays as it was"


@pytest.mark.parametrize("name", FAMILY)
def test_a_family_loses_a_block_and_opens_anywhere(name, family, tiny_jsonl, tmp_path):
    like = family(name)
    stage = apply("prune.layers", base_of(like), tmp_path / "d", drop=1, data=str(tiny_jsonl), **FEW)
    module = opened(stage)
    made = logits_of(module, IDS)
    assert len(linears(module)) == (FAMILIES[name][1]["num_hidden_layers"] - 1) * FAMILIES[name][2]
    assert torch.isfinite(made).all()
    assert torch.equal(made, in_plain_transformers(stage.weights))
    assert torch.equal(made, without_a_block(like, *stage.notes["dropped"]))


def without_a_block(folder: Path, dropped: int) -> torch.Tensor:
    """The logits of a model one of whose blocks only passes its input on."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    (blocks,) = (m for m in module.modules() if isinstance(m, torch.nn.ModuleList))
    blocks[dropped].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return logits_of(module, IDS)


def test_layers_differ_as_the_recipe_says_and_a_tied_head_is_untied(family, tiny_jsonl, tmp_path):
    like = family("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in stored(like)
    modules = {"layers.0.": "skip", "down_proj": {"bits": 8}, "lm_head": {"bits": 4, "group_size": -1}}
    settings = {"group_size": 32, "bits": 3, "modules": modules, "data": str(tiny_jsonl), **FEW}
    stage = apply("quantize.gptq", base_of(like), tmp_path / "q", **settings)
    config = json.loads((stage.weights / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    bits = {name: layer.bits for name, layer in opened(stage).named_modules() if hasattr(layer, "bits")}
    of_a_block = [(name, 8 if "down_proj" in name else 3) for name in linears(opened(stage)) if ".1." in name]
    assert bits == {**dict(of_a_block), **{n.replace(".1.", ".2."): b for n, b in of_a_block}, "lm_head": 4}
    after = stored(stage.weights)
    assert len(after["lm_head.scales"]) == 1
    assert torch.equal(after["model.embed_tokens.weight"], stored(like)["model.embed_tokens.weight"])
    assert_packed_right(stage.weights, tmp_path)


def test_a_fused_layer_speaks_for_parts_of_one_grid_and_parts_of_several_are_a_finding(tiny_llama, tmp_path):
    modules = {"(q|k|v)_proj": {"bits": 8}, "gate_proj": "skip"}
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "q", group_size=32, modules=modules)
    dynamic = json.loads((stage.weights / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic[r"+:model\.layers\.0\.self_attn\.qkv_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert not any("gate_up_proj" in pattern for pattern in dynamic)
    assert re.match(r"model.layers.0.mlp.(gate|up)_proj .* fuses with it \(2 such places\)", stage.notes["finding"])


QUICK_GRIDS: list[dict[str, Any]] = [
    *({"bits": bits, "sym": False} for bits in (2, 3, 4, 8)),
    {"bits": 4, "desc_act": True, "static_groups": False},
]
OTHER_GRIDS: list[dict[str, Any]] = [
    *({"bits": bits} for bits in (2, 3, 8)),
    {"bits": 3, "desc_act": True, "static_groups": False},
    {"bits": 4, "desc_act": False, "static_groups": False, "true_sequential": False},
    {"bits": 8, "group_size": -1},
]


@pytest.mark.parametrize(
    "grid", [*QUICK_GRIDS, *(pytest.param(grid, marks=pytest.mark.slow) for grid in OTHER_GRIDS)], ids=str
)
def test_every_grid_is_opened_as_its_files_say(grid, family, tiny_jsonl, tmp_path):
    settings = {"group_size": 32, **grid, "data": str(tiny_jsonl), **FEW}
    stage = apply("quantize.gptq", base_of(family("llama")), tmp_path / "q", **settings)
    assert_packed_right(stage.weights, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_head_is_quantized_where_it_is_named(name, family, tiny_jsonl, tmp_path):
    settings = {"group_size": 32, "modules": {"(lm_head|embed_out)$": {"bits": 8}}, "data": str(tiny_jsonl), **FEW}
    stage = apply("quantize.gptq", base_of(family(name)), tmp_path / "q", **settings)
    assert opened(stage).get_output_embeddings().bits == 8
    assert_packed_right(stage.weights, tmp_path)

"""bitsandbytes: what is saved is what is opened, by us and by plain transformers, and gradients stay true."""

import json

import pytest
import torch
from helpers import apply, base_of, logits_of, reshaped, some_ids

from llmq.files import LAYERS
from llmq.matrix.layer_error import OUTPUTS
from llmq.text.bnb_layers import is_packed, is_packed_for_cpu, keep_unpacked, layers_4bit, weight_of

KINDS = [
    {"bits": 4, "quant_type": "nf4", "double_quant": True},
    {"bits": 4, "quant_type": "nf4", "double_quant": False},
    {"bits": 4, "quant_type": "fp4", "double_quant": True},
    {"bits": 8},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_saved_stage_reopens_to_the_same_logits_here_and_in_plain_transformers(tiny_llama, tmp_path, settings):
    from transformers import AutoModelForCausalLM

    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)
    ids = some_ids()
    with stage.open("cpu") as loaded:
        ours = logits_of(loaded.module, ids)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(stage.weights).eval(), ids)
    assert torch.equal(ours, plain)
    with base_of(tiny_llama).open("cpu") as loaded:
        assert not torch.equal(ours, logits_of(loaded.module, ids)), "quantization changed nothing"


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_error_of_each_layer_is_that_of_the_opened_weights(tiny_llama, tmp_path, settings):
    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)
    facts = json.loads((stage.weights / LAYERS).read_text())
    with stage.open("cpu") as loaded, base_of(tiny_llama).open("cpu") as before:
        for name, its in facts.items():
            made = weight_of(loaded.module.get_submodule(name)).float()
            was = before.module.get_submodule(name).weight.float()
            chosen = torch.linspace(0, len(was) - 1, min(OUTPUTS, len(was))).long()
            error = float((made - was)[chosen].norm() / was[chosen].norm())
            assert its["bits"] == settings["bits"]
            assert its["error"] == pytest.approx(error, rel=0.02)
        assert len(facts) == len(list(filter(is_packed, loaded.module.modules())))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_quantizing_twice_writes_the_same_bytes(tiny_llama, tmp_path, settings):
    stages = [apply("quantize.bnb", base_of(tiny_llama), tmp_path / name, **settings) for name in "ab"]
    first, second = ((s.weights / "model.safetensors").read_bytes() for s in stages)
    assert first == second


def gradient(module, ids) -> torch.Tensor:
    """Of the loss, with respect to the embeddings that go in."""
    embeddings = module.get_input_embeddings()(ids).detach().requires_grad_()
    module(inputs_embeds=embeddings).logits.float().logsumexp(-1).sum().backward()
    return embeddings.grad.flatten().double()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_gradients_before_and_after_an_evaluation_agree(tiny_llama, tmp_path, settings):
    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)
    ids = some_ids()
    with stage.open("cpu") as loaded:
        keep_unpacked(loaded.module)
        before = gradient(loaded.module.train(), ids)
        logits_of(loaded.module.eval(), ids)
        between = gradient(loaded.module.train(), ids)
    with stage.open("cpu") as loaded:
        logits_of(loaded.module, ids)  # where the processor can, this packs the weights
        keep_unpacked(loaded.module)
        after = gradient(loaded.module.train(), ids)
    assert torch.cosine_similarity(before, between, dim=0) == pytest.approx(1, abs=1e-9)
    assert torch.cosine_similarity(before, after, dim=0) >= 0.999


def test_the_trap_is_still_there(tiny_llama, tmp_path):
    """When this fails, bitsandbytes has mended its repacking and `keep_unpacked` can go."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("needs a processor with AVX-512 BF16")
    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q")
    with stage.open("cpu") as loaded:
        logits_of(loaded.module, some_ids())
        assert all(is_packed_for_cpu(layer) for layer in layers_4bit(loaded.module))
        untrue = gradient(loaded.module.train(), some_ids())
        keep_unpacked(loaded.module)
        true = gradient(loaded.module, some_ids())
    assert torch.cosine_similarity(untrue, true, dim=0) < 0.999


def test_shapes_that_the_packed_kernel_does_not_divide_are_left_unpacked(tiny_llama, tmp_path):
    shape = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 2, "num_key_value_heads": 1}
    odd = reshaped(tiny_llama, tmp_path / "odd", **shape, head_dim=36)
    stage = apply("quantize.bnb", base_of(odd), tmp_path / "q")
    with stage.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()


def test_skipped_modules_stay_float_and_so_does_the_head(tiny_llama, tmp_path):
    from bitsandbytes.nn import Linear4bit

    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", skip_modules=["down_proj"])
    with stage.open("cpu") as loaded:
        kinds = {
            name: type(layer) for name, layer in loaded.module.named_modules() if isinstance(layer, torch.nn.Linear)
        }
    assert all((kind is Linear4bit) == ("down_proj" not in n and "lm_head" not in n) for n, kind in kinds.items())


def repack(module) -> None:
    """What bitsandbytes does to 4-bit layers at their first evaluation where a processor has AVX-512 BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for layer in layers_4bit(module):
        if not is_packed_for_cpu(layer):
            packed, layer.weight.quant_state = _convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
            layer.weight.data = packed


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_weight_is_read_the_same_before_and_after_repacking(tiny_llama, tmp_path, settings):
    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)
    with stage.open("cpu") as loaded:
        layers = {name: layer for name, layer in loaded.module.named_modules() if is_packed(layer)}
        before = {name: weight_of(layer).float() for name, layer in layers.items()}
        logits_of(loaded.module, some_ids())
        repack(loaded.module)
        after = {name: weight_of(layer).float() for name, layer in layers.items()}
    with base_of(tiny_llama).open("cpu") as loaded:
        own = {name: loaded.module.get_submodule(name).weight.float() for name in layers}
    for name, weight in before.items():
        assert ((weight - own[name]).norm() / own[name].norm()).item() < 0.13, "4 bits lose about a tenth"
        # Repacking rounds scales to bfloat16, once or, where they are quantized themselves, twice.
        torch.testing.assert_close(after[name], weight, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("settings", [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])], ids=str)
def test_an_adapter_adds_its_own_bytes_and_no_more(tiny_llama, tiny_jsonl, tmp_path, settings):
    """PEFT's layers answer with the weight under them: its scales were counted twice."""
    from llmq.tasks.size import bytes_in_memory

    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)
    adapted = apply("adapt.lora", stage, tmp_path / "a", data=str(tiny_jsonl), r=4, max_length=64, max_steps=1)
    with stage.open("cpu") as before:
        alone = bytes_in_memory(before.module)
    with adapted.open("cpu") as after:
        adapter = sum(p.nbytes for name, p in after.module.named_parameters() if "lora_" in name)
        assert bytes_in_memory(after.module) == alone + adapter


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_size_does_not_depend_on_what_was_asked_before(tiny_llama, tmp_path, settings):
    from llmq.tasks.size import Size

    stage = apply("quantize.bnb", base_of(tiny_llama), tmp_path / "q", **settings)

    def asked(first) -> dict[str, float]:
        with stage.open("cpu") as loaded:
            first(loaded.module)
            return {m.metric: m.value for m in Size().score(loaded)}

    at_once = asked(lambda module: None)
    assert asked(lambda module: logits_of(module, some_ids())) == at_once
    assert asked(repack) == at_once
    float_bytes = {m.metric: m.value for m in Size().score(base_of(tiny_llama).model.open(base_of(tiny_llama), "cpu"))}
    assert at_once["parameters"] == float_bytes["parameters"]
    assert at_once["bytes_in_memory"] < float_bytes["bytes_in_memory"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_dora_over_quantized_weights_is_measured_as_it_is_merged(tiny_llama, tmp_path, settings):
    from dataclasses import replace

    from peft import LoraConfig, get_peft_model

    stage = apply("quantize.bnb", base_of(tiny_llama, "float32"), tmp_path / "q", **{**settings, **FLOAT32})
    with stage.open("cpu") as loaded:
        keep_unpacked(loaded.module)
        model = get_peft_model(loaded.module, LoraConfig(use_dora=True, target_modules="all-linear", r=4))
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(tmp_path / "a")
    adapted = replace(stage, adapter=tmp_path / "a")
    with adapted.open("cpu") as loaded:
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers_4bit(loaded.module))
        first, second = (logits_of(loaded.module, some_ids()) for _ in range(2))
        assert torch.equal(first, second)
    merged = apply("adapt.merge", adapted, tmp_path / "m", window=32, tokens=64)
    with merged.open("cpu") as loaded:
        there = logits_of(loaded.module, some_ids())
    error = ((first - there).norm() / there.norm()).item()
    assert error < (0.02 if settings["bits"] == 8 else 1e-4), "LLM.int8() rounds activations, merged weights do not"


FLOAT32 = {"compute_dtype": "float32"}

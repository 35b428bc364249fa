"""The captured step of a packed model: the tokens and logits of the model's own, or no capture."""

import gc

import pytest
import tiny_text_models
import torch
from helpers import apply, base_of, some_ids

from llmq.text import captured

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def counted(monkeypatch):
    """The captured steps so far, and the refusals."""
    made = []
    stock = captured._Steps._captured
    monkeypatch.setattr(captured._Steps, "_captured", lambda *a: made.append(stock(*a)) or made[-1])
    return made


@pytest.mark.parametrize(
    "settings", [{}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"bits": 8}, {"sym": False}))]
)
def test_tokens_and_logits_are_those_of_the_model(settings, tiny_llama, tmp_path, counted):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", **{"bits": 4, "group_size": 32, **settings})
    ids = some_ids(1, 12)
    told = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    with stage.open("cpu") as loaded, torch.inference_mode():
        loaded.module.get_input_embeddings().padding_idx = 2  # as of SmolLM2
        made = loaded.module.generate(input_ids=ids, **told)
        again = loaded.module.generate(input_ids=some_ids(1, 20), **told)
        del loaded.module.forward
        own = loaded.module.generate(input_ids=ids, **told)
        own_again = loaded.module.generate(input_ids=some_ids(1, 20), **told)
        assert loaded.module.get_input_embeddings().padding_idx == 2
    assert [bool(step) for step in counted] == [True]
    for one, other in ((made, own), (again, own_again)):
        assert torch.equal(one.sequences, other.sequences)
        assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(one.logits, other.logits, strict=True))


def test_layers_that_are_exchanged_after_the_capture_are_heeded(tiny_llama, tmp_path, counted):
    from peft import LoraConfig, get_peft_model

    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", bits=4, group_size=32)
    told = {"input_ids": some_ids(1, 12), "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    told |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with stage.open("cpu") as loaded, torch.inference_mode():
        loaded.module.generate(**told)
        assert [bool(step) for step in counted] == [True]
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(loaded.module, config).eval()
        made = adapted.generate(**told)
        del loaded.module.forward
        own = adapted.generate(**told)
    assert torch.equal(made.sequences, own.sequences)
    assert all(torch.equal(a, b) for a, b in zip(made.logits, own.logits, strict=True))


def a_new_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight * 3, requires_grad=False)


def other_numbers_of_it(layer):
    layer.weight.data = layer.weight.data * 3


def changed_in_place(layer):
    layer.weight.mul_(3)


def other_scales(layer):
    layer.scales = layer.scales * 3


CHANGES = [
    ("model.norm", a_new_parameter), ("model.norm", other_numbers_of_it), ("model.norm", changed_in_place),
    ("model.layers.0.mlp.up_proj.planes.0", other_scales),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "change"), CHANGES)
def test_weights_that_change_after_the_capture_are_heeded(layer, change, tiny_llama, tmp_path, counted):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", bits=4, group_size=32)
    told = {"input_ids": some_ids(1, 12), "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    told |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with stage.open("cpu") as loaded, torch.inference_mode():
        before = loaded.module.generate(**told).logits[-1]
        assert [bool(step) for step in counted] == [True]
        change(loaded.module.get_submodule(layer))
        made = loaded.module.generate(**told)
        del loaded.module.forward
        own = loaded.module.generate(**told)
    assert not torch.allclose(own.logits[-1], before, rtol=0.02, atol=0.02), "the change must matter"
    assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(made.logits, own.logits, strict=True))


def test_a_captured_step_keeps_no_weights_once_its_model_is_closed(tiny_llama, tmp_path, counted):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", bits=4, group_size=32)
    ids = some_ids(1, 12)

    def held() -> int:
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if isinstance(t, torch.Tensor))

    before = held()
    with stage.open("cpu") as loaded, torch.inference_mode():
        loaded.module.generate(input_ids=ids, max_new_tokens=16, min_new_tokens=16, pad_token_id=0)
        assert held() > before + 1000
    assert [bool(step) for step in counted] == [True]
    counted.clear()
    del loaded
    assert held() <= before + 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "mamba2"])
def test_other_models_are_left_alone(name, tiny_llama, tmp_path, counted):
    folder = tiny_text_models.build(name, tmp_path / "model", tiny_llama)
    stage = apply("quantize.rtn", base_of(folder), tmp_path / "packed", bits=4, group_size=32)
    with stage.open("cpu") as loaded, torch.inference_mode():
        loaded.module.generate(input_ids=some_ids(1, 12), max_new_tokens=16, min_new_tokens=16, pad_token_id=0)
    # A step that goes through the experts that were chosen is not captured, and tried once.
    assert counted == ([None] if name == "qwen3_moe" else [])


def test_hooks_and_padding_are_heeded(tiny_llama, tmp_path, counted):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", bits=4, group_size=32)
    ids = some_ids(1, 12)
    told = {"max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    with stage.open("cpu") as loaded, torch.inference_mode():
        loaded.module.generate(input_ids=ids, attention_mask=(torch.arange(12) > 2).long()[None], **told)
        seen = []
        loaded.module.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
        loaded.module.generate(input_ids=ids, **told)
    assert len(seen) == 16
    assert not counted

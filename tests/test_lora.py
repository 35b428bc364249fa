"""adapt.lora: true gradients, the same bytes from the same seed, whatever happens in between."""

import json
from contextlib import nullcontext

import pytest
import torch
from helpers import adapter_bytes, apply, base_of, dying_at, logits_of, some_ids
from safetensors.torch import load

from llmq import plugin
from llmq.adapt.lora import Lora
from llmq.text.examples import Collator, Tokens
from llmq.text.fast_path import FastPath

QUICK = {"r": 4, "max_length": 64, "max_steps": 4, "per_device_train_batch_size": 2, "lora_dropout": 0.1}
BASES = {"bf16": None, "nf4": {"bits": 4}, "fp4": {"bits": 4, "quant_type": "fp4"}, "int8": {"bits": 8}}


@pytest.fixture(params=["bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "fp4", "int8"))])
def any_base(request, tiny_llama, tmp_path):
    """The tiny model, bf16 or quantized."""
    settings = BASES[request.param]
    base = base_of(tiny_llama)
    return apply("quantize.bnb", base, tmp_path / "base", **settings) if settings else base


def test_evaluations_in_between_leave_no_trace(any_base, tiny_jsonl, tmp_path):
    with_them = apply("adapt.lora", any_base, tmp_path / "a", data=str(tiny_jsonl), **QUICK, eval_steps=1)
    without = apply("adapt.lora", any_base, tmp_path / "b", data=str(tiny_jsonl), **QUICK, held_out_rows=0)
    assert len(with_them.notes["training"]["held_out_loss"]) == 4
    assert not without.notes["training"]["held_out_loss"]
    assert adapter_bytes(with_them) == adapter_bytes(without)
    assert with_them.notes["training"]["fast_path"] == "used"


@pytest.mark.slow
def test_inputs_that_peft_would_widen_first_give_the_same_adapter(any_base, tiny_jsonl, tmp_path, monkeypatch):
    """The widened copy is rounded back to the bits that it was made of; only memory and time differ."""
    settings = {"data": str(tiny_jsonl), **QUICK, "lora_dropout": 0.0}
    once = apply("adapt.lora", any_base, tmp_path / "once", **settings)
    monkeypatch.setattr("peft.helpers.disable_input_dtype_casting", lambda *_: nullcontext())
    assert adapter_bytes(once) == adapter_bytes(apply("adapt.lora", any_base, tmp_path / "widened", **settings))


@pytest.mark.slow
def test_the_seed_decides(tiny_llama, tiny_jsonl, tmp_path):
    base = base_of(tiny_llama)
    first, again, other = (
        adapter_bytes(apply("adapt.lora", base, tmp_path / name, data=str(tiny_jsonl), seed=seed, **QUICK))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_a_killed_training_goes_on_to_the_same_adapter(any_base, tiny_jsonl, tmp_path, monkeypatch):
    settings = {"data": str(tiny_jsonl), **QUICK, "max_steps": 6, "save_steps": 2}
    whole = apply("adapt.lora", any_base, tmp_path / "whole", **settings)

    with dying_at(5, monkeypatch):
        apply("adapt.lora", any_base, tmp_path / "killed", **settings)
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    resumed = apply("adapt.lora", any_base, tmp_path / "killed", **settings)
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_accumulated_small_batches_equal_one_large_batch(tiny_llama, tiny_jsonl, tmp_path):
    """Plain gradient descent makes the change of the weights the gradient itself."""
    settings = {
        "data": str(tiny_jsonl),
        "r": 4,
        "max_length": 64,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1e9,
        "packing": False,
    }
    base = base_of(tiny_llama, "float32")
    large = apply("adapt.lora", base, tmp_path / "a", per_device_train_batch_size=4, **settings)
    small = apply(
        "adapt.lora", base, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    one, other = load(adapter_bytes(large)), load(adapter_bytes(small))
    assert any(v.abs().max() > 1e-4 for k, v in one.items() if "lora_B" in k), "nothing was learned"
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)
    assert large.notes["training"]["loss"] == small.notes["training"]["loss"]


def test_an_adapter_opens_in_plain_peft(any_base, tiny_jsonl, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stage = apply("adapt.lora", any_base, tmp_path / "a", data=str(tiny_jsonl), **QUICK)
    base = AutoModelForCausalLM.from_pretrained(stage.weights, dtype=torch.bfloat16)
    plain = logits_of(PeftModel.from_pretrained(base, stage.adapter).eval(), some_ids())
    with stage.open("cpu") as loaded:
        assert torch.equal(logits_of(loaded.module, some_ids()), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"optim": "adamw_8bit"},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"packing": False},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5},
        {"max_steps": None, "num_train_epochs": 2},
        {"training_arguments": {"max_grad_norm": 0.1}},
    ],
    ids=str,
)
def test_every_option_trains(tiny_llama, tiny_jsonl, tmp_path, settings):
    stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **{**QUICK, **settings})
    losses = [loss for _, loss in stage.notes["training"]["loss"]]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    with stage.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()


@pytest.mark.slow
def test_what_is_learned_is_learned(tiny_llama, tiny_jsonl, tmp_path):
    stage = apply(
        "adapt.lora",
        base_of(tiny_llama),
        tmp_path / "a",
        data=str(tiny_jsonl),
        **{**QUICK, "max_steps": 60, "modules_to_save": ["lm_head"], "learning_rate": 1e-2},
    )
    losses = [loss for _, loss in stage.notes["training"]["loss"]]
    assert losses[-1] < 0.8 * losses[0]


def peft_model(folder, dtype="float32"):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.config.use_cache = False  # as adapt.lora sets it: with a cache, transformers' attention sees across examples
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def test_the_logits_of_a_packed_example_are_those_of_it_alone(tiny_llama):
    """By our attention within segments, and by transformers' own from the positions that begin anew."""
    model = peft_model(tiny_llama)
    examples = [Tokens(tuple(row), (True,) * len(row)) for row in (some_ids(1, n)[0].tolist() for n in (7, 19, 3))]
    batch = Collator(0)([examples, examples[:1]])
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    fast = FastPath(model)
    fast.see(batch["position_ids"])
    with torch.inference_mode():
        by_transformers = model(**inputs).logits
        with fast.switched_on():
            hidden = model(**inputs).logits  # while switched on, the head hands through what it is given
        by_us = fast.head(hidden)
    for row, names in ((0, (0, 1, 2)), (1, (0,))):
        start = 0
        for i in names:
            end = start + len(examples[i])
            alone = logits_of(model, torch.tensor([examples[i].ids]))[0]
            torch.testing.assert_close(by_us[row, start:end], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(by_transformers[row, start:end], alone, rtol=1e-4, atol=1e-5)
            start = end


def test_the_fast_path_gives_the_loss_and_gradients_of_the_model_itself(tiny_llama):
    model = peft_model(tiny_llama)
    fast = FastPath(model)
    assert fast.why_not() == ""
    examples = [Tokens(tuple(row), (False, False) + (True,) * (len(row) - 2)) for row in some_ids(3, 20).tolist()]
    batch = Collator(0)([examples[:2], examples[2:]])

    def loss_and_gradients():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock, stock_gradients = loss_and_gradients()
    fast.see(batch["position_ids"])
    with fast.switched_on():
        ours, gradients = loss_and_gradients()
    assert ours == pytest.approx(stock, rel=1e-5)
    assert gradients.keys() == stock_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, stock_gradients[name], rtol=1e-3, atol=1e-6)
    assert loss_and_gradients()[0] == stock, "switched off, the model is itself again"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.1}),
        ("nanochat", {"final_logit_softcapping": 15.0}),
    ],
)
def test_a_model_that_changes_its_logits_trains_by_its_own_loss(family, settings):
    """Weights as small as these give about the same loss without the change, and gradients of another size."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=400, num_key_value_heads=2, use_cache=False, **shape, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert "after the output head" in FastPath(adapted).why_not()


@pytest.mark.parametrize(
    ("rows", "epochs", "settings", "steps"),
    [
        (9, 3, {"per_device_train_batch_size": 8}, 6),
        (9, 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 6),
        (30, 0.1, {"per_device_train_batch_size": 1}, 3),
        (9, 1, {"per_device_train_batch_size": 8, "training_arguments": {"dataloader_drop_last": True}}, 1),
    ],
)
def test_an_epoch_sees_every_row(rows, epochs, settings, steps):
    step = Lora(data="pydoc", num_train_epochs=epochs, **settings)
    assert step._steps_of(rows) == steps


def test_three_epochs_see_every_token_three_times(tiny_llama, tmp_path):
    data = tmp_path / "nine.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}+{i}=", "completion": "{2 * i}"}}\n' for i in range(9)))
    settings = {**QUICK, "max_steps": None, "num_train_epochs": 3, "packing": False, "per_device_train_batch_size": 8}
    stage = apply(
        "adapt.lora", base_of(tiny_llama), tmp_path / "a", data={"file": {"path": str(data), "held_out": 0}}, **settings
    )
    assert stage.notes["training"]["tokens"] == 3 * stage.notes["tokens"]["train"]["tokens"]


def test_a_trained_head_trains_by_the_models_own_loss(tiny_llama, tiny_jsonl, tmp_path):
    stage = apply(
        "adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **QUICK, modules_to_save=["lm_head"]
    )
    assert "head" in stage.notes["training"]["fast_path"]


def test_counts_of_rows_stand_in_the_notes(tiny_llama, tiny_jsonl, tmp_path):
    stage = apply(
        "adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **{**QUICK, "max_length": 24}
    )
    data, train = stage.notes["data"], stage.notes["tokens"]["train"]
    assert data["read"] == data["train"] + data["held_out"] == 20
    assert train["rows"] == data["train"] == train["used"] + train["prompt_too_long"]


def test_target_modules_that_are_not_there_are_refused(tiny_llama, tiny_jsonl, tmp_path):
    from llmq.errors import UserError

    with pytest.raises(UserError, match="nowhere_proj"):
        apply(
            "adapt.lora",
            base_of(tiny_llama),
            tmp_path / "a",
            data=str(tiny_jsonl),
            **QUICK,
            target_modules=["nowhere_proj"],
        )


def test_paged_optimizers_are_refused_where_there_is_nothing_to_page_to(tiny_jsonl):
    from llmq.errors import UserError

    lora = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), "optim": "paged_adamw_8bit"}})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="adamw_8bit"):
            lora.check()


@pytest.mark.parametrize(("weights", "named"), [("org/tiny-model", "org/tiny-model"), (None, None)])
def test_an_adapter_names_the_hub_id_of_its_base_and_a_moved_run_opens(
    tiny_llama, tiny_jsonl, tmp_path, weights, named
):
    import shutil
    from dataclasses import replace

    from llmq.artifact import Artifact

    base = base_of(tiny_llama)
    if weights:  # as a hub id leaves it: the weights lie in a cache, the model is called by its name
        base = replace(base, model=base.model.model_copy(update={"weights": weights}))
    settings = {"r": 4, "max_length": 64, "max_steps": 1, "per_device_train_batch_size": 2}
    quantized = apply("quantize.bnb", base, tmp_path / "run" / "1-quantize.bnb")
    stage = apply("adapt.lora", quantized, tmp_path / "run" / "2-adapt.lora", data=str(tiny_jsonl), **settings)
    assert stage.adapter
    said = json.loads((stage.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert said == (named or "../1-quantize.bnb")
    assert (stage.adapter / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    stage.save(tmp_path / "run" / "2-adapt.lora")
    with stage.open("cpu") as loaded:
        before = logits_of(loaded.module, some_ids())
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with Artifact.load(tmp_path / "elsewhere" / "2-adapt.lora").open("cpu") as loaded:
        assert torch.equal(logits_of(loaded.module, some_ids()), before)


def test_rows_that_lose_their_end_or_are_left_out_are_told(tiny_llama, tmp_path, capsys):
    rows = [{"prompt": f"word {i} " * (30 if i % 3 else 1), "completion": "answer " * 40} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"file": {"path": str(tmp_path / "rows.jsonl"), "held_out": 0}}
    apply("adapt.lora", base_of(tiny_llama), tmp_path / "s", data=data, r=2, max_steps=1, max_length=32)
    told = capsys.readouterr().err
    assert "4 of 12 rows lose their end, and the end mark with it: they are longer than max_length 32" in told
    assert "8 of 12 rows are left out: no token to learn stands within max_length 32" in told

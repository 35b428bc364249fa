"""What training_arguments ask for is in force, or is refused in one line."""

import pytest
import torch
from helpers import apply, base_of

from llmq import plugin
from llmq.errors import UserError
from llmq.text import in_force, training

QUICK = {"r": 4, "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2}


def tuned(tiny_llama, tiny_jsonl, folder, arguments, **settings):
    words = {"data": str(tiny_jsonl), **QUICK, **settings, "training_arguments": arguments}
    return apply("adapt.lora", base_of(tiny_llama), folder, **words)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weight_decai": 0.1}, "transformers has no 'weight_decai'; did you mean 'weight_decay'?"),
        ({"bf16": False}, "'bf16' has no effect: model.dtype decides"),
        ({"label_smoothing_factor": 0.1}, "'label_smoothing_factor' has no effect: the loss is over shifted labels"),
        ({"torch_compile": True}, "'torch_compile' has no effect: rows differ in their examples"),
        ({"prediction_loss_only": True}, "'prediction_loss_only' has no effect that could be checked; leave it out"),
        ({"run_name": "mine"}, "'run_name' has no effect: nothing is reported; name a tracker in report_to"),
        ({"run_name": "mine", "report_to": "none"}, "'run_name' has no effect: nothing is reported"),
        ({"max_steps": 5}, "'max_steps' is 5, and max_steps of the step is 2; set one of them"),
        ({"max_grad_norm": -1}, "max_grad_norm: Input should be greater than 0"),
        ({"optim": "no_such"}, "optim: Input should be "),
    ],
    ids=str,
)
def test_names_and_values_are_refused_before_anything_runs(tiny_llama, tiny_jsonl, arguments, said):
    step = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), **QUICK, "training_arguments": arguments}})
    with pytest.raises(UserError) as caught:
        step.check_base(base_of(tiny_llama))
    assert str(caught.value).startswith(f"training_arguments: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"fsdp": "full_shard"}, "distributed"),  # transformers' own words, in one line
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "eep"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters: True is not in force here"),
        ({"ddp_backend": "gloo"}, "Default process group has not been initialized"),
        ({"optim_args": "foreach=True,no_such=1"}, "optim_args: 'foreach=True,no_such=1' is not in force here"),
        (
            {"torch_empty_cache_steps": 1},
            "torch_empty_cache_steps: 1 is not in force here, where training is 1 process",
        ),
        ({"lr_scheduler_kwargs": {"no_such": 1}}, "no_such"),
        ({"load_best_model_at_end": True}, "requires the save and eval strategy to match"),
    ],
    ids=str,
)
def test_what_is_not_in_force_is_refused_in_one_line(tiny_llama, tiny_jsonl, tmp_path, arguments, said):
    with pytest.raises(UserError) as caught:
        tuned(tiny_llama, tiny_jsonl, tmp_path, arguments, held_out_rows=0)
    assert str(caught.value).startswith("training_arguments")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_betas_of_an_optimizer_that_has_none_are_refused(tiny_llama, tiny_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"adam_beta1: 0\.8 is not in force"):
        tuned(tiny_llama, tiny_jsonl, tmp_path, {"adam_beta1": 0.8}, optim="sgd")


@pytest.mark.parametrize(
    "arguments",
    [
        {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        {"neftune_noise_alpha": 5.0},
        {"lr_scheduler_kwargs": {"num_cycles": 2.0}},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True},
        {"data_seed": 3},
        {"load_best_model_at_end": True, "save_strategy": "steps"},
        {"logging_steps": 1, "eval_delay": 1, "save_total_limit": 1},
    ],
    ids=str,
)
def test_what_is_in_force_trains(tiny_llama, tiny_jsonl, tmp_path, arguments):
    assert tuned(tiny_llama, tiny_jsonl, tmp_path, arguments).notes["training"]["steps"] == 2


def test_the_step_whose_weights_were_kept_is_told(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    stock = training.PackedTrainer.evaluate
    monkeypatch.setattr(
        training.PackedTrainer, "evaluate", lambda self, **_: stock(self) | {"eval_loss": float(self.state.global_step)}
    )
    told = tuned(tiny_llama, tiny_jsonl, tmp_path, {"load_best_model_at_end": True}).notes["training"]
    assert (told["steps"], told["kept_step"]) == (2, 1)


def test_the_best_of_losses_without_a_checkpoint_each_is_refused(tiny_jsonl):
    """transformers kept the last weights without a word where the best step had no checkpoint."""
    settings = {"data": str(tiny_jsonl), "eval_steps": 1, "training_arguments": {"load_best_model_at_end": True}}
    with pytest.raises(UserError, match="needs a checkpoint; eval_steps is 1 and save_steps None; set both alike"):
        plugin.build({"adapt.lora": settings}).check()
    plugin.build({"adapt.lora": {**settings, "save_steps": 1}}).check()


@pytest.mark.slow
def test_an_argument_that_is_a_field_is_that_field(tiny_llama, tiny_jsonl, tmp_path):
    """The steps of an epoch are counted with the accumulation that is in force."""
    settings = {"max_steps": None, "packing": False}
    by_field = tuned(tiny_llama, tiny_jsonl, tmp_path / "a", {}, **settings, gradient_accumulation_steps=4)
    by_argument = tuned(tiny_llama, tiny_jsonl, tmp_path / "b", {"gradient_accumulation_steps": 4}, **settings)
    assert by_argument.notes["training"]["steps"] == by_field.notes["training"]["steps"] == 3
    assert by_argument.notes["training"]["tokens"] == by_field.notes["training"]["tokens"]


def test_a_setting_that_a_library_puts_aside_is_told(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """An optimizer in place of the one that was asked for, as a launcher's own configuration brings it."""
    stock = training.PackedTrainer.create_optimizer

    def other(self, model=None):
        stock(self, model)
        self.optimizer = torch.optim.SGD(self.optimizer.param_groups, 1e-3)
        return self.optimizer

    monkeypatch.setattr(training.PackedTrainer, "create_optimizer", other)
    with pytest.raises(UserError, match=r"optim 'AdamW' was asked for, and 'SGD' is in force"):
        tuned(tiny_llama, tiny_jsonl, tmp_path, {})


def test_a_warm_up_that_a_constant_rate_never_makes_is_refused(tiny_jsonl):
    step = plugin.build({"adapt.lora": {"data": str(tiny_jsonl), "lr_scheduler_type": "constant", "warmup_ratio": 0.1}})
    with pytest.raises(UserError, match="'constant' has no warm-up; 'constant_with_warmup' has"):
        step.check()


def test_every_argument_of_transformers_has_one_answer():
    """No argument falls through: a field of the step, decided elsewhere, looked at, or refused."""
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {f.name for f in fields(TrainingArguments)}
    assert set(in_force.ELSEWHERE) <= known
    assert set(in_force.LOOKS) <= known
    assert not set(in_force.ELSEWHERE) & set(in_force.LOOKS)
    for name in known - set(in_force.LOOKS):
        with pytest.raises(UserError, match="has no effect"):
            in_force.check_names({name: 1}, {}, frozenset())

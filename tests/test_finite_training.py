"""The first loss or gradient that is not finite ends a training by step and name; what was whole before is kept."""

import json

import pytest
import torch
from helpers import CPU, apply, base_of
from test_train import Tiny, trained

from llmq import checkpoints, finite, plugin
from llmq.errors import LlmqError, UserError
from llmq.text import training
from llmq.vision import loop
from llmq.vision.family import Learner, Training

QUICK = {"r": 4, "max_length": 64, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2}


class Poison(torch.autograd.Function):
    """The number as it is, and a gradient that is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_lora_ends_at_the_step_and_keeps_the_last_whole_checkpoint(what, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    stock = training.PackedTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        if not model.training or self.state.global_step < 4:
            return loss
        return loss * float("inf") if what == "loss" else Poison.apply(loss)

    monkeypatch.setattr(training.PackedTrainer, "compute_loss", poisoned)
    named = {
        "loss": "the loss of step 5 is not a finite number",
        "gradient": r"the gradient of \S+lora_\S+ in step 5 is",
    }
    with pytest.raises(LlmqError, match=named[what] + r".*lower learning_rate; .*kept in \S+checkpoint-4$"):
        apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **QUICK)
    kept = checkpoints.newest(tmp_path / "a" / "checkpoints")
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 4
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for t in load_file(kept / "adapter_model.safetensors").values())
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_a_learning_rate_that_diverges_leaves_no_adapter_and_no_loss_of_nought(tiny_llama, tiny_jsonl, tmp_path):
    with pytest.raises(LlmqError, match=r"finite"):
        apply(
            "adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl),
            **{**QUICK, "learning_rate": 1e38, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 1e30},
        )  # fmt: skip
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_a_held_out_loss_that_is_no_number_ends_the_job(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    stock = training.PackedTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        return loss if model.training else loss * float("nan")

    monkeypatch.setattr(training.PackedTrainer, "compute_loss", poisoned)
    with pytest.raises(LlmqError, match="the held-out loss after step 1 is not a finite number"):
        apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **QUICK, eval_steps=1)


def test_rows_without_a_token_to_learn_are_counted_and_left_out(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """A tokenizer without an end mark makes a text of one token of a short one: its loss is a mean over nothing."""
    from llmq.text import tokens

    stock = tokens.encode_all

    def with_single_tokens(rows, tokenizer, max_length, ends):
        examples, counts = stock(rows, tokenizer, max_length, ends)
        return [*[tokens.Tokens((5,), (True,))] * 30, *examples], counts

    monkeypatch.setattr(tokens, "encode_all", with_single_tokens)
    settings = {**QUICK, "max_steps": 2, "packing": False}
    stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **settings)
    assert stage.notes["tokens"]["train"]["nothing_to_learn"] == 30
    assert all(loss > 0 for _, loss in stage.notes["training"]["loss"])


class Breaking(Tiny):
    """Its loss or its gradient breaks at the third step, of the network or of its judge."""

    what: str = "loss"

    def learners(self, network):
        made = super().learners(network)

        def breaking(learner):
            seen = []

            def loss(batch):
                seen.append(1)
                value = learner.loss(batch)
                if len(seen) < 3:
                    return value
                return value * float("nan") if self.what == "loss" else Poison.apply(value)

            return Learner(learner.name, learner.module, loss)

        return [*made[:-1], breaking(made[-1])]


@pytest.mark.parametrize("judges", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_image_model_ends_at_the_step_and_keeps_the_last_whole_checkpoint(what, judges, tmp_path, monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda word: Breaking)
    who = " of the loss" if judges else ""
    named = {
        "loss": f"the loss{who} of step 3 is not a finite number",
        "gradient": rf"the gradient of 0\.weight{who} in step 3 is not",
    }
    with pytest.raises(LlmqError, match=rf"^{named[what]}.*kept in .*checkpoint-2$"):
        trained(tmp_path / "a", Breaking(judges=judges, what=what), save_steps=2)
    kept = torch.load(tmp_path / "a/checkpoints/checkpoint-2/state.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(bool(t.isfinite().all()) for p in kept["players"] for t in p.values())
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_a_running_mean_that_is_not_finite_is_never_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda word: Tiny)
    with Tiny().base(CPU).open("cpu") as loaded:
        loaded.module[1].running_mean[2] = float("inf")
        training = Training(1, 1e-3, "")
        run = loop.Run(loaded.artifact.model, loaded, training, tmp_path)
        with pytest.raises(LlmqError, match=r"after step 7 1\.running_mean is not finite; lower learning_rate$"):
            run.check_state(7)


def test_the_first_tensor_that_is_not_finite_is_named():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, float("-inf")]), "c": torch.tensor([float("nan")])}
    assert finite.first_not_finite(tensors) == "b"
    assert finite.first_not_finite({"a": torch.ones(3), "n": torch.tensor([2**40]), "none": torch.ones(0)}) == ""
    assert finite.first_not_finite({"large": torch.full((4,), 3e38)}) == "", "its sum would overflow"
    assert finite.first_not_finite({}) == ""


def test_a_batch_of_one_under_batch_normalization_is_one_line(tmp_path, monkeypatch):
    class OneValue(Tiny):
        def network(self):
            layers = torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
            return torch.nn.Sequential(*layers)

    monkeypatch.setattr(plugin, "load", lambda word: OneValue)
    with pytest.raises(UserError, match=r"^normalization over a batch .*; raise batch_size above 1"):
        trained(tmp_path / "a", OneValue(), batch_size=1)
    assert trained(tmp_path / "b", OneValue(), batch_size=2).notes["training"]["steps"] == 12


def test_a_merge_that_overflows_its_dtype_is_refused_by_the_tensors_name(tiny_llama, tiny_jsonl, tmp_path):
    stage = apply("adapt.lora", base_of(tiny_llama), tmp_path / "a", data=str(tiny_jsonl), **{**QUICK, "max_steps": 1})
    from safetensors.torch import load_file, save_file

    file = stage.adapter / "adapter_model.safetensors"
    tensors = {k: torch.full_like(v, 300.0) for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(LlmqError, match=r"\S+ is not finite in float16; set dtype: float32"):
        apply("adapt.merge", stage, tmp_path / "m", dtype="float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_thousands_is_found_wherever_it_stands(dtype, value):
    for place in (0, 1, 17, 4094, 4095):
        tensor = torch.ones(64, 64, dtype=dtype)
        tensor.view(-1)[place] = value
        assert finite.first_not_finite({"before": torch.ones(3), "it": tensor, "after": tensor.clone()}) == "it"
    strided = torch.ones(64, 64, dtype=dtype).t()[::2]
    assert finite.first_not_finite({"strided": strided}) == ""
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert finite.first_not_finite({"largest": largest}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [{0, 3}, set(), set(range(6))], ids=len)
def test_steps_that_float16_skips_are_counted_and_all_of_them_are_an_error(
    skipped, tiny_llama, tiny_jsonl, tmp_path, monkeypatch
):
    """As the scaler of float16 on an accelerator tells of them; a processor has none."""
    from accelerate import Accelerator

    steps = iter(range(6))
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", False)
    stock = training.Watch.on_step_end

    def at_a_step(self, args, state, control, **kwargs):
        monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", next(steps) in skipped)
        stock(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Watch, "on_step_end", at_a_step)
    job = ("adapt.lora", base_of(tiny_llama), tmp_path / "a")
    if len(skipped) == 6:
        with pytest.raises(LlmqError, match="the gradients of all 6 steps overflowed float16"):
            apply(*job, data=str(tiny_jsonl), **QUICK)
        assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    else:
        told = apply(*job, data=str(tiny_jsonl), **QUICK).notes["training"].get("skipped_steps", 0)
        assert told == len(skipped)

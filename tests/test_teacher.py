"""A teacher beside the data: the loss and its gradient, packed rows, and the same bytes whatever happens in between."""

import pytest
import torch
from helpers import adapter_bytes, apply, base_of, dying_at, logits_of, some_ids
from test_fused_loss import problem
from torch.nn.functional import cross_entropy, kl_div

from llmq import plugin
from llmq.errors import UserError
from llmq.text.examples import IGNORED, Collator, Tokens
from llmq.text.fast_path import FastPath
from llmq.text.fused_loss import ROWS_AT_A_TIME, Taught, linear_cross_entropy
from llmq.text.fused_loss import cross_entropy as taught_cross_entropy
from llmq.text.teaching import Teacher

QUICK = {"r": 4, "max_length": 64, "max_steps": 4, "per_device_train_batch_size": 2, "lora_dropout": 0.1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_are_those_of_autograd(alpha, temperature):
    hidden, head, targets = problem(ROWS_AT_A_TIME + 30, bias=True)
    head.requires_grad_(True)
    kept = targets != IGNORED
    logits = torch.randn(int(kept.sum()), head.out_features, generator=torch.Generator().manual_seed(9))
    taught = Taught(lambda part: logits[part], alpha, temperature)
    said = head(hidden)[kept]
    apart = kl_div(
        (said / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1), reduction="sum", log_target=True
    )
    expected = (1 - alpha) * cross_entropy(said, targets[kept], reduction="sum") + alpha * temperature**2 * apart
    wanted = torch.autograd.grad(expected, (hidden, head.weight, head.bias))
    for loss in (
        linear_cross_entropy(hidden, head, targets, IGNORED, taught),
        taught_cross_entropy(head(hidden), targets, IGNORED, taught),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
        for mine, its in zip(torch.autograd.grad(loss, (hidden, head.weight, head.bias)), wanted, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_is_the_student_leaves_the_gradient_of_the_data_alone():
    hidden, head, targets = problem(40)
    own = head(hidden).detach()[targets != IGNORED]
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, IGNORED), hidden)
    taught = Taught(lambda part: own[part], 0.25, 1.0)
    (mixed,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, IGNORED, taught), hidden)
    torch.testing.assert_close(mixed, 0.75 * plain, rtol=1e-4, atol=1e-6)


def test_packed_examples_are_answered_as_if_each_were_alone(tiny_llama):
    base = base_of(tiny_llama, "float32")
    module = base.model.open(base, "cpu").module
    teacher = Teacher(module, 0.5, 1.0)
    assert teacher.fast
    examples = [Tokens(tuple(row), (True,) * len(row)) for row in (some_ids(1, n)[0].tolist() for n in (7, 19, 3))]
    batch = Collator(0)([examples])
    student = FastPath(base.model.open(base, "cpu").module)  # a student is on its own fast path all the while
    with student.switched_on():
        teacher.see(batch)
        student.see(batch["position_ids"])
        during = student.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert torch.equal(during, teacher.made)
    found = teacher.told(torch.ones_like(batch["input_ids"], dtype=torch.bool)).logits(slice(None))
    expected = torch.cat([logits_of(module, torch.tensor([e.ids]))[0] for e in examples])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    teacher.fast = None  # as for a model whose attention cannot be exchanged
    teacher.see(batch)
    found = teacher.told(torch.ones_like(batch["input_ids"], dtype=torch.bool)).logits(slice(None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    return apply("prune.layers", base_of(tiny_llama), tmp_path_factory.mktemp("pruned"), drop=1, samples=2, length=32)


@pytest.mark.slow
def test_fast_and_own_path_learn_the_same(pruned, tiny_jsonl, tmp_path, monkeypatch):
    settings = {"data": str(tiny_jsonl), **QUICK, "teacher": "base", "temperature": 2.0}
    fast = apply("adapt.lora", pruned, tmp_path / "a", **settings)
    monkeypatch.setattr(FastPath, "why_not", lambda self: "as a test asks")
    own = apply("adapt.lora", pruned, tmp_path / "b", **settings)
    assert (fast.notes["training"]["fast_path"], own.notes["training"]["fast_path"]) == ("used", "as a test asks")
    for (_, one), (_, other) in zip(fast.notes["training"]["loss"], own.notes["training"]["loss"], strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.slow
def test_a_taught_training_is_one_of_its_seed_and_goes_on_after_a_kill(pruned, tiny_jsonl, tmp_path, monkeypatch):
    settings = {"data": str(tiny_jsonl), **QUICK, "teacher": "base", "save_steps": 2}
    whole = apply("adapt.lora", pruned, tmp_path / "whole", **settings)
    plain = apply("adapt.lora", pruned, tmp_path / "plain", **{**settings, "teacher": None})
    with dying_at(3, monkeypatch):
        apply("adapt.lora", pruned, tmp_path / "killed", **settings)
    resumed = apply("adapt.lora", pruned, tmp_path / "killed", **settings)
    assert adapter_bytes(resumed) == adapter_bytes(whole) != adapter_bytes(plain)
    assert whole.notes["training"]["teacher"] == "0-base"
    assert "teacher" not in plain.notes["training"]


def test_settings_of_a_teacher_want_a_teacher():
    with pytest.raises(UserError, match="alpha has no effect without teacher: base"):
        plugin.build({"adapt.lora": {"data": "pydoc", "alpha": 0.3}}).check()

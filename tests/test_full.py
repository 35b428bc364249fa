"""adapt.full: whole weights learn, zeros stay zeros, the same bytes from the same seed, whatever happens in between."""

import json

import pytest
import torch
from helpers import apply, base_of, dying_at, logits_of, some_ids
from safetensors.torch import load_file
from test_blockwise import assert_same_files

from llmq import plugin
from llmq.errors import UserError

QUICK = {"max_length": 64, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_in(stage):
    return {name: t for file in stage.weights.glob("*.safetensors") for name, t in load_file(file).items()}


def test_every_weight_learns_and_is_saved_as_the_base_was(tiny_llama, tiny_jsonl, tmp_path):
    base = base_of(tiny_llama)
    stage = apply("adapt.full", base, tmp_path / "a", data=str(tiny_jsonl), **QUICK)
    before, after = weights_in(base), weights_in(stage)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert stage.notes["training"]["fast_path"] == "used"
    assert stage.notes["weights_moved_by"] > 0
    assert not stage.adapter
    configs = [json.loads((each / "config.json").read_text()) for each in (base.weights, stage.weights)]
    assert configs[0].get("use_cache") == configs[1].get("use_cache")
    assert not (tmp_path / "a" / "checkpoints").exists()
    with stage.open("cpu") as loaded:
        assert torch.isfinite(logits_of(loaded.module, some_ids())).all()


@pytest.mark.parametrize("teacher", [None, pytest.param("base", marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_to_the_same_weights(teacher, tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    pruned = apply("prune.layers", base_of(tiny_llama), tmp_path / "p", drop=1, samples=2, length=32)
    settings = {"data": str(tiny_jsonl), **QUICK, "save_steps": 2, "teacher": teacher}
    whole = apply("adapt.full", pruned, tmp_path / "whole", **settings)
    with dying_at(3, monkeypatch):
        apply("adapt.full", pruned, tmp_path / "killed", **settings)
    resumed = apply("adapt.full", pruned, tmp_path / "killed", **settings)
    assert_same_files(whole.weights, resumed.weights)
    assert whole.notes["training"].get("teacher") == (teacher and "0-base")


SLOW = [pytest.param(optim, marks=pytest.mark.slow) for optim in ("adamw_torch", "lion_32bit", "adafactor", "sgd")]


@pytest.mark.parametrize("optim", ["adamw_8bit", *SLOW])  # moments in 8 bits move weights of no gradient
def test_pruned_weights_stay_zero(optim, tiny_llama, tiny_jsonl, tmp_path):
    pruned = apply("prune.magnitude", base_of(tiny_llama), tmp_path / "p", sparsity=0.5)
    settings = {"data": str(tiny_jsonl), **QUICK, "optim": optim, "weight_decay": 0.1}
    stage = apply("adapt.full", pruned, tmp_path / "a", **settings)
    before, after = weights_in(pruned), weights_in(stage)
    matrices = [name for name in before if "proj" in name]
    assert matrices
    assert all((after[name][before[name] == 0] == 0).all() for name in matrices)
    assert stage.notes["held_at_zero"] == sum(int((before[name] == 0).sum()) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in matrices)


def test_zeros_learn_where_asked(tiny_llama, tiny_jsonl, tmp_path):
    pruned = apply("prune.magnitude", base_of(tiny_llama), tmp_path / "p", sparsity=0.5)
    stage = apply("adapt.full", pruned, tmp_path / "a", data=str(tiny_jsonl), keep_sparsity=False, **QUICK)
    before, after = weights_in(pruned), weights_in(stage)
    assert any((after[name][before[name] == 0] != 0).any() for name in before)


def test_the_gradient_is_that_of_plain_cross_entropy(tiny_llama, tiny_jsonl, tmp_path):
    """One step of plain gradient descent, on the fast path and by the model's own attention and loss."""
    from llmq.text.fast_path import FastPath

    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    settings = {"data": str(tiny_jsonl), **QUICK, **step, "max_grad_norm": 1e9}
    base = base_of(tiny_llama, "float32")
    fast = weights_in(apply("adapt.full", base, tmp_path / "a", **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastPath, "why_not", lambda self: "as a test asks")
        own = weights_in(apply("adapt.full", base, tmp_path / "b", **settings))
    for name in fast:
        torch.testing.assert_close(fast[name], own[name], rtol=1e-3, atol=1e-5)


def test_sharded_weights_are_refused():
    with pytest.raises(UserError, match="fsdp shares weights out"):
        plugin.build({"adapt.full": {"data": "pydoc", "training_arguments": {"fsdp": "full_shard"}}}).check()


@pytest.mark.parametrize("word", ["adapt.full", "adapt.scales"])
def test_weights_that_the_launcher_would_share_out_are_refused(word, monkeypatch):
    """`accelerate launch --config_file` says so in the environment, and not in the recipe."""
    plugin.build({word: {"data": "pydoc"}}).check()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=f"accelerate's fsdp shares weights out; adapt.lora trains so, {word} not"):
        plugin.build({word: {"data": "pydoc"}}).check()

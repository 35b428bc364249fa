"""Checkpoints that were cut short or damaged are said and passed over; a training goes on to the same bytes anyway."""

import shutil
from typing import Any

import pytest
from helpers import adapter_bytes, apply, base_of
from test_train import Tiny, trained, weights

from llmq import checkpoints, plugin
from llmq.text import training
from llmq.vision import loop

LORA = {"r": 2, "max_length": 64, "per_device_train_batch_size": 2, "lora_dropout": 0.1, "max_steps": 6}
NOISY = ("seconds", "tokens_per_second", "examples_per_second")


def counts(artifact: Any) -> dict[str, Any]:
    """What a training says of itself, without its times."""
    return {name: value for name, value in artifact.notes["training"].items() if name not in NOISY}


def sealed(folder, step, **files):
    """A checkpoint with these files."""
    checkpoint = checkpoints.place(folder, step)
    checkpoint.mkdir(parents=True)
    for name, text in files.items():
        (checkpoint / name).write_text(text)
    checkpoints.seal(checkpoint)
    return checkpoint


DAMAGE = {
    "half a file": (lambda c: (c / "state").write_text("{"), "state is damaged"),
    "a file less": (lambda c: (c / "optimizer").unlink(), "optimizer is missing"),
    "no manifest": (lambda c: (c / checkpoints.MANIFEST).unlink(), "it was not finished"),
    "half a manifest": (lambda c: (c / checkpoints.MANIFEST).write_text('{"st'), "manifest.json is no manifest"),
    "another manifest": (lambda c: (c / checkpoints.MANIFEST).write_text("[]"), "manifest.json is no manifest"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_one_is_taken_and_newer_ones_are_said(kind, tmp_path, capsys):
    files = {"state": "{}", "optimizer": "o"}
    nine = sealed(tmp_path, 9, **files)
    ten = sealed(tmp_path, 10, **files)
    assert checkpoints.newest(tmp_path) == ten
    assert capsys.readouterr().err == ""
    damage, said = DAMAGE[kind]
    damage(ten)
    assert checkpoints.newest(tmp_path) == nine
    assert capsys.readouterr().err == f"  checkpoint-10 is passed over: {said}\n"


def test_old_ones_go_but_for_the_best(tmp_path):
    one, _, three, four = (sealed(tmp_path, step, state="s") for step in (1, 2, 3, 4))
    checkpoints.drop_old(tmp_path, 2, [one])
    assert set(tmp_path.iterdir()) == {one, three, four}


def killed_lora(base, data, folder, monkeypatch, at, **settings):
    """A LoRA that ends at the end of a step; after the last one everything is done but the saving of the adapter."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Watch, "on_train_end" if at == settings["max_steps"] else "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            apply("adapt.lora", base, folder, data=data, **settings)


@pytest.mark.slow
def test_a_lora_killed_at_its_end_trains_no_step_more(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """Ten rows of twenty are five steps an epoch: the last step is in the middle of one."""
    base, data = base_of(tiny_llama), str(tiny_jsonl)
    settings = {**LORA, "lr_scheduler_type": "constant", "save_steps": 2, "packing": False, "learning_rate": 0.01}
    whole = apply("adapt.lora", base, tmp_path / "whole", data=data, **settings)
    killed_lora(base, data, tmp_path / "killed", monkeypatch, 6, **settings)
    resumed = apply("adapt.lora", base, tmp_path / "killed", data=data, **settings)
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert counts(resumed) == counts(whole)
    assert counts(whole)["steps"] == 6


def spoil(name, how):
    """Damage the newest checkpoint of a training."""

    def damage(folder):
        file = checkpoints.last_sealed(folder / "checkpoints") / name
        if how == "half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()

    return damage


SPOILED = [
    ("trainer_state.json", "half", "damaged"),
    ("optimizer.pt", "half", "damaged"),
    ("optimizer.pt", "gone", "missing"),
    ("rng_state.pth", "gone", "missing"),
    ("scheduler.pt", "half", "damaged"),
    ("adapter_model.safetensors", "half", "damaged"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "said"), SPOILED)
def test_a_lora_goes_on_from_the_checkpoint_before_a_damaged_one(
    name, how, said, tiny_llama, tiny_jsonl, tmp_path, monkeypatch, capsys
):
    base, data = base_of(tiny_llama), str(tiny_jsonl)
    settings = {**LORA, "save_steps": 2, "packing": False}
    whole = apply("adapt.lora", base, tmp_path / "whole", data=data, **settings)
    killed_lora(base, data, tmp_path / "killed", monkeypatch, 5, **settings)
    spoil(name, how)(tmp_path / "killed")
    capsys.readouterr()
    resumed = apply("adapt.lora", base, tmp_path / "killed", data=data, **settings)
    assert f"  checkpoint-4 is passed over: {name} is {said}\n" in capsys.readouterr().err
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert counts(resumed) == counts(whole)


WAYS = [
    *({"lr_scheduler_type": name} for name in ("linear", "cosine", "constant", "constant_with_warmup")),
    {"packing": True, "save_steps": 1},
    {"gradient_accumulation_steps": 3, "save_steps": 1},
    {"training_arguments": {"logging_steps": 3}, "save_steps": 2},
    {"training_arguments": {"neftune_noise_alpha": 5.0}},
    {"training_arguments": {"dataloader_num_workers": 1}},
    {"use_dora": True, "modules_to_save": ("lm_head",)},
    *({"optim": name} for name in ("adafactor", "lion_8bit", "adamw_8bit", "sgd", "ademamix", "rmsprop", "adagrad")),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_a_lora_killed_at_any_step_goes_on_to_the_same_bytes_and_counts(
    way, tiny_llama, tiny_jsonl, tmp_path, monkeypatch
):
    base, data = base_of(tiny_llama), str(tiny_jsonl)
    settings = {**LORA, "save_steps": 2, "packing": False, "per_device_train_batch_size": 4, **way}
    whole = apply("adapt.lora", base, tmp_path / "whole", data=data, **settings)
    for at in (3, 6) if "optim" in way else range(1, 7):
        folder = tmp_path / f"killed-{at}"
        killed_lora(base, data, folder, monkeypatch, at, **settings)
        resumed = apply("adapt.lora", base, folder, data=data, **settings)
        assert adapter_bytes(resumed) == adapter_bytes(whole), at
        assert counts(resumed) == counts(whole), at
        shutil.rmtree(folder)


@pytest.fixture
def _tiny_is_known(monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda word: Tiny)


@pytest.mark.slow
@pytest.mark.usefixtures("_tiny_is_known")
@pytest.mark.parametrize("judges", [0, 2])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_an_image_model_killed_at_any_step_goes_on_to_the_same_bytes_and_counts(
    schedule, judges, tmp_path, monkeypatch
):
    model, settings = Tiny(judges=judges), {"max_steps": 5, "save_steps": 2, "lr_scheduler_type": schedule}
    whole = trained(tmp_path / "whole", model, **settings)
    step = loop.Run.step
    for at in range(5):
        with monkeypatch.context() as patch:

            def die(*args, at=at):
                if args[-1] == at:
                    raise KeyboardInterrupt
                return step(*args)

            patch.setattr(loop.Run, "step", die)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path / f"killed-{at}", model, **settings)
        resumed = trained(tmp_path / f"killed-{at}", model, **settings)
        assert weights(resumed) == weights(whole)
        assert counts(resumed) == counts(whole)


@pytest.mark.usefixtures("_tiny_is_known")
@pytest.mark.parametrize("how", ["half", "gone"])
def test_an_image_model_goes_on_from_the_checkpoint_before_a_damaged_one(how, tmp_path, monkeypatch, capsys):
    whole = trained(tmp_path / "whole", save_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "check_state", lambda run, step: 1 / (step < 12))
        with pytest.raises(ZeroDivisionError):
            trained(tmp_path / "killed", save_steps=2)
    spoil("state.pt", how)(tmp_path / "killed")
    resumed = trained(tmp_path / "killed", save_steps=2)
    assert "checkpoint-10 is passed over: state.pt is" in capsys.readouterr().err
    assert weights(resumed) == weights(whole)
    assert counts(resumed) == counts(whole)

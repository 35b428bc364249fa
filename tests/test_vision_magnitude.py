"""prune.magnitude on image models: the same masks as for a language model, on convolutions as matrices."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import CPU
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.vision.family import ImageModel
from llmq.vision.state import read_state, save_network


class Layers(nn.Module):
    """One of each that is pruned, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.grouped, self.up = nn.Conv2d(8, 12, 3, groups=2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.normed, self.last = weight_norm(nn.Conv2d(8, 8, 1)), nn.Linear(8, 6)

    def forward(self, x: Any) -> Any:
        x = self.up(self.grouped(self.norm(self.first(x)).relu()))
        return self.last(self.normed(x).mean((2, 3)))


class Net(ImageModel):
    """The network above."""

    kind: ClassVar[str] = "classifier"

    def network(self) -> Any:
        return Layers()

    def example(self, batch_size: int) -> Any:
        return torch.randn(batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(0))


WEIGHTS = ("first", "grouped", "up", "normed", "last")


def pruned(folder: Path, model: Any = None, **settings: Any) -> tuple[Artifact, Artifact]:
    """The base, and what pruning makes of it."""
    step: Any = plugin.build({"prune.magnitude": settings})
    base = (model or Net()).base(CPU)
    step.check_base(base)
    folder.mkdir(exist_ok=True)
    return base, step.apply(base, folder, CPU)


def weights(artifact: Artifact) -> dict[str, Any]:
    with artifact.open("cpu") as loaded:
        return {name: loaded.module.get_submodule(name).weight.detach().clone() for name in WEIGHTS}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_smallest_of_each_layer_go_and_nothing_else_changes(tmp_path, share):
    base, made = pruned(tmp_path / "made", sparsity=share)
    before, after = weights(base), weights(made)
    for name in WEIGHTS:
        gone = after[name] == 0
        assert gone.sum() == round(share * gone.numel())
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        torch.testing.assert_close(after[name][~gone], before[name][~gone])
    others = [name for name in read_state(str(base.weights)) if name.endswith("bias") or "norm." in name]
    old, new = read_state(str(base.weights)), read_state(str(made.weights))
    assert others
    assert all(torch.equal(old[name], new[name]) for name in others)
    assert made.notes["pruned_layers"] == len(WEIGHTS)


def test_a_pattern_runs_over_neighbouring_inputs_of_each_place_of_the_kernel(tmp_path):
    base, made = pruned(tmp_path / "made", pattern="2:4")
    before, after = weights(base), weights(made)
    for name in WEIGHTS:
        inputs = 0 if name == "up" else 1
        rows = after[name].movedim(inputs, -1).reshape(-1, 4)
        full = before[name].movedim(inputs, -1).reshape(-1, 4)
        assert bool((rows.count_nonzero(1) == 2).all())
        kept = full.abs().sort(dim=1).values[:, 2:]
        torch.testing.assert_close(rows.abs().sort(dim=1).values[:, 2:], kept)


def test_layers_can_be_skipped_or_set_apart_the_last_one_too(tmp_path):
    modules = {"last": "skip", "first": {"sparsity": 0.75}, "": {"sparsity": 0.25}}
    base, made = pruned(tmp_path / "made", modules=modules)
    zeros = {name: float((w == 0).float().mean()) for name, w in weights(made).items()}
    assert zeros == pytest.approx({"first": 0.75, "grouped": 0.25, "up": 0.25, "normed": 0.25, "last": 0}, abs=0.01)
    assert torch.equal(weights(base)["last"], weights(made)["last"])


def test_a_filter_that_goes_whole_says_nothing_and_not_nan(tmp_path):
    model = Net()
    with model.base(CPU).open("cpu") as loaded:
        network = loaded.module
    network.normed.parametrizations.weight.original0.data[3] = 1e-6
    base = Artifact(model, tmp_path / "base")
    base.weights.mkdir()
    save_network(network, base.weights)
    (tmp_path / "made").mkdir()
    step: Any = plugin.build({"prune.magnitude": {"sparsity": 0.25}})
    after = weights(step.apply(base, tmp_path / "made", CPU))["normed"]
    assert after[3].count_nonzero() == 0
    assert after.isfinite().all()


def test_the_order_of_stages_channels_first_then_single_weights(tmp_path):
    step: Any = plugin.build({"prune.channels": {"round_to": 2}})
    (tmp_path / "narrow").mkdir()
    narrow = step.apply(Net().base(CPU), tmp_path / "narrow", CPU)
    assert narrow.notes["channels"]
    (tmp_path / "sparse").mkdir()
    sparse = plugin.build({"prune.magnitude": {}}).apply(narrow, tmp_path / "sparse", CPU)  # type: ignore[attr-defined]
    shapes = {name: w.shape for name, w in weights(sparse).items()}
    assert shapes == {name: w.shape for name, w in weights(narrow).items()}
    assert all(float((w == 0).float().mean()) == pytest.approx(0.5, abs=0.02) for w in weights(sparse).values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": "4:8"}, "pattern '4:8' of first: 4 is not divisible by 8; these are: 2, 4"),
        ({"modules": {"frist": "skip"}}, "no layer's name matches 'frist'; did you mean 'first'?"),
        ({"modules": {".*": "skip"}}, "skips every layer; leave one to prune"),
    ],
)
def test_what_the_layers_do_not_allow_is_said_before_anything_runs(settings, says):
    step: Any = plugin.build({"prune.magnitude": settings})
    with pytest.raises(UserError) as raised:
        step.check_base(Net().base(CPU))
    assert says in str(raised.value)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    model = Net()
    with model.base(CPU).open("cpu") as loaded:
        network = loaded.module
    network.up.weight.data[0, 0, 0, 0] = float("inf")
    save_network(network, tmp_path)
    step: Any = plugin.build({"prune.magnitude": {}})
    with pytest.raises(UserError, match=r": not finite numbers in 'up.weight'"):
        step.apply(Artifact(model, tmp_path), tmp_path, CPU)


def test_the_same_in_means_the_same_bytes_out(tmp_path):
    first, second = (pruned(tmp_path / name)[1].weights / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "model",
    [
        {"timm_classifier": {"architecture": "mobilenetv3_small_050", "classes": 10, "input_size": 32}},
        {"wdsr": {"n_resblocks": 1}},
        {"dcgan": {"features": 8}},
        {"torchvision_detector": {"size": 64}},
    ],
    ids=lambda model: next(iter(model)),
)
def test_real_families_keep_their_shapes_and_lose_half_of_their_weights(model, tmp_path):
    base, made = pruned(tmp_path / "made", plugin.build(model, "models"))
    old, new = read_state(str(base.weights)), read_state(str(made.weights))
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    heavy = [n for n, t in new.items() if t.dim() > 1 and not n.endswith("original0")]
    share = sum(int((new[n] == 0).sum()) for n in heavy) / sum(new[n].numel() for n in heavy)
    assert share == pytest.approx(0.5, abs=0.01)
    with made.open("cpu") as loaded, torch.no_grad():
        outputs = loaded.module(made.model.example(1))  # type: ignore[attr-defined]
    assert all(bool(t.isfinite().all()) for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("held", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_training_afterwards_keeps_the_zeros_unless_told_otherwise(held, tmp_path):
    model = plugin.build({"timm_classifier": {"architecture": "resnet10t", "classes": 10, "input_size": 32}}, "models")
    _, made = pruned(tmp_path / "made", model)
    step: Any = plugin.build({"adapt.train": {"data": "digits", "max_steps": 2, "keep_sparsity": held}})
    (tmp_path / "trained").mkdir()
    before, after = (read_state(str(a.weights)) for a in (made, step.apply(made, tmp_path / "trained", CPU)))
    heavy = [name for name, tensor in before.items() if tensor.dim() > 1]
    assert any(not torch.equal(before[name], after[name]) for name in heavy)
    zeros = [bool((after[name][before[name] == 0] == 0).all()) for name in heavy]
    assert all(zeros) if held is None else not any(zeros)

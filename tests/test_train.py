"""adapt.train: one loop, whatever learns; the same weights from the same seed, killed or not."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import CPU

from llmq import plugin
from llmq.adapt.train import Train
from llmq.errors import LlmqError, UserError
from llmq.types import Data
from llmq.vision import loop
from llmq.vision.family import ImageModel, Learner, Training
from llmq.vision.images import Example, make_split


class Slopes(Data):
    """Images whose label is whether they grow brighter to the right."""

    suits: ClassVar[frozenset[str]] = frozenset({"classifier"})

    def read(self) -> Any:
        rng = np.random.default_rng(0)
        examples = []
        for i in range(24):
            ramp = np.linspace(0, 200, 8)[None, :, None] * np.ones((8, 1, 1))
            image = (ramp if i % 2 else ramp[:, ::-1]) + rng.uniform(0, 50, (8, 8, 1))
            examples.append(Example(str(i), image.astype(np.uint8), label=i % 2))
        return make_split(examples[:20], examples[20:], "image/label", ["slopes"])


class Tiny(ImageModel):
    """A convolution, a norm, dropout, and as many learners as asked for, the later ones judging the first."""

    kind: ClassVar[str] = "classifier"
    training: ClassVar[Training] = Training(4, 1e-2, "nats an image")
    judges: int = 0
    broken: bool = False

    def network(self) -> Any:
        layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
        return torch.nn.Sequential(*layers, torch.nn.Dropout(0.2), torch.nn.Linear(144, 2))

    def prepare(self, images: Any) -> Any:
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    def example(self, batch_size: int) -> Any:
        return torch.linspace(0, 1, batch_size * 64).view(batch_size, 1, 8, 8)

    def learners(self, network: Any) -> list[Learner]:
        def loss(batch: Any) -> Any:
            logits = network(batch["images"])
            return torch.nn.functional.cross_entropy(logits, batch["labels"]) / (0 if self.broken else 1)

        judges = [torch.nn.Linear(64, 1) for _ in range(self.judges)]
        others = [
            Learner(f"judge {i}", j, lambda b, j=j: j(b["images"].flatten(1)).square().mean() * 1e-3)
            for i, j in enumerate(judges)
        ]
        return [*others, Learner("loss", network, loss)]

    def batch(self, examples: Any, rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        noise = torch.from_numpy(rng.normal(0, 0.01, (len(examples), 1, 8, 8)).astype(np.float32))
        labels = torch.tensor([e.label for e in examples])
        return {"images": self.prepare([e.image for e in examples]) + noise, "labels": labels}

    def validate_on(self, loaded: Any, examples: Any) -> tuple[str, float]:
        with torch.no_grad():
            right = loaded.module(self.prepare([e.image for e in examples])).argmax(1)
        return "top1", float((right == torch.tensor([e.label for e in examples])).float().mean())


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda word: {"test_train": Tiny}[word])


def trained(folder: Any, model: Any = None, **settings: Any) -> Any:
    """What training leaves."""
    folder.mkdir(exist_ok=True)
    step = Train.model_construct(**{**Train(data=Slopes(), max_steps=12).__dict__, **settings})
    return step.apply((model or Tiny()).base(CPU), folder, CPU)


def weights(artifact: Any) -> bytes:
    return (artifact.weights / "model.safetensors").read_bytes()


def test_it_learns_and_says_what_it_did(tmp_path):
    made = trained(tmp_path / "a", max_steps=60)
    told = made.notes["training"]
    assert told["loss"][-1][1] < 0.3 * told["loss"][0][1]
    assert told["held_out"][-1] == [60, 1.0]
    assert (told["metric"], told["steps"], told["examples"], told["batch_size"]) == ("top1", 60, 240, 4)
    with made.open("cpu") as loaded:
        assert Tiny().validate_on(loaded, Slopes().read().held_out) == ("top1", 1.0)
    assert not list((tmp_path / "a").glob("checkpoint*"))


def test_the_same_seed_gives_the_same_bytes_whatever_is_watched(tmp_path):
    one = weights(trained(tmp_path / "a"))
    torch.rand(3)
    assert weights(trained(tmp_path / "b", held_out_examples=0, save_steps=5)) == one
    assert weights(trained(tmp_path / "c", seed=1)) != one


@pytest.mark.parametrize("judges", [0, 1])
@pytest.mark.parametrize("killed_at", [1, 4, 11])
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch, judges, killed_at):
    model = Tiny(judges=judges)
    whole = weights(trained(tmp_path / "whole", model))
    step = loop.Run.step

    def die(*args: Any) -> Any:
        if args[-1] == killed_at:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", die)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", model)
    made = trained(tmp_path / "killed", model)
    assert weights(made) == whole
    assert made.notes["training"]["loss"][-1][0] == 12


def test_a_loss_that_is_no_number_ends_the_job(tmp_path):
    with pytest.raises(LlmqError, match="the loss of step 1 is not a finite number; lower learning_rate"):
        trained(tmp_path / "a", Tiny(broken=True))


@pytest.mark.slow
def test_bfloat16_products_and_channels_last_learn_alike(tmp_path):
    plain = trained(tmp_path / "a", max_steps=40).notes["training"]["loss"][-1][1]
    for name, settings in (("b", {"autocast": True}), ("c", {"channels_last": True})):
        assert trained(tmp_path / name, max_steps=40, **settings).notes["training"]["loss"][-1][1] == pytest.approx(
            plain, abs=0.1
        )


@pytest.mark.parametrize(("n", "size"), [(7, 3), (8, 8), (3, 5)])
def test_every_epoch_visits_every_example_once_in_an_order_of_its_own(n, size):
    places = [p for step in range(3 * n) for p in loop.order(n, size, 0, step)]
    epochs = [tuple(places[i : i + n]) for i in range(0, len(places) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_the_rate_warms_up_and_ends_near_nothing():
    common = Training(1, 1.0, "", max_steps=100, warmup_steps=10)
    for schedule in ("cosine", "linear"):
        training = replace(common, lr_scheduler_type=schedule)
        rates = [training.rate(step) for step in range(100)]
        assert rates[:10] == sorted(rates[:10])
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert max(rates) == rates[10] == 1.0
        assert rates[-1] < 0.02
    constant = replace(common, lr_scheduler_type="constant", warmup_steps=0)
    assert {constant.rate(step) for step in (0, 50, 99)} == {1.0}


def test_a_training_part_without_examples_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(Slopes, "read", lambda self: make_split([], [], "image/label", ["none"]))
    step: Any = Train.model_construct(data=Slopes())
    with pytest.raises(UserError, match=r"the training part of .* is empty; hold less out"):
        step.check_base(Tiny().base(CPU))


def test_a_head_of_zeros_learns_though_zeros_are_kept(tmp_path):
    with Tiny().base(CPU).open("cpu") as loaded:
        loaded.module[-1].weight.data.zero_()
        loaded.module[0].weight.data[0] = 0
        split = Slopes().read()
        settings = {"lr_scheduler_type": "constant", "eval_steps": 9, "save_steps": 9, "keep_sparsity": True}
        training = Training(4, 1e-2, "", "adam", max_steps=3, **settings)
        loop.Run(loaded.artifact.model, loaded, training, tmp_path).train(split.train, [])
        assert bool((loaded.module[-1].weight != 0).any())
        assert not bool(loaded.module[0].weight[0].any())

"""adapt.distill for classifiers, detectors and super-resolution, adapt.qat, and the distances behind both."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from llmq import plugin, recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.openvino_runtime import core
from llmq.types import Context, Samples
from llmq.vision import loop
from llmq.vision.images import Example
from llmq.vision.teaching import Lessons, Maps, check_alike, teacher_of

CPU = Context("cpu", 0)
RESNET = {
    "timm_classifier": {
        "architecture": "resnet10t",
        "model_args": {"channels": [8, 8, 16, 16]},
        "classes": 10,
        "channels": 1,
        "input_size": 32,
    }
}
FCOS = {"torchvision_detector": {"size": 64}}
TWO_STAGES = {"torchvision_detector": {"architecture": "faster_rcnn", "size": 64}}
EDSR = {"edsr": {"n_feats": 8, "n_resblocks": 1, "scale": 2}}
DATA = {
    "classifier": "digits",
    "detector": {"scenes": {"train": 2, "held_out": 4, "size": 64, "scale": [10, 30]}},
    "super-resolution": {"rock": {"scale": 2, "size": 96, "train_slices": 2}},
}


def model_of(entry: Any, seed: int = 0) -> Artifact:
    return plugin.build(entry, "models").base(Context("cpu", seed))


def lessons(kind: str = "classifier", **settings: Any) -> Lessons:
    return Lessons(SimpleNamespace(kind=kind), nn.Identity(), **{"loss": "kl", **settings})


def test_the_divergence_is_that_of_hinton():
    rng = np.random.default_rng(0)
    made, wanted = rng.normal(size=(2, 5, 4))
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(1, keepdims=True) for x in (wanted, made))
    slow = 9 * np.mean([sum(a * np.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p, q, strict=True)])
    found = lessons(temperature=3.0).distance([torch.from_numpy(made)], [torch.from_numpy(wanted)])
    assert float(found) == pytest.approx(slow, rel=1e-6)


def test_each_of_several_outputs_counts_alike_whatever_its_scale():
    torch.manual_seed(0)
    wanted = [torch.randn(2, 3), torch.randn(2, 5)]
    made = [w + torch.randn_like(w) for w in wanted]
    plain = lessons("detector", loss="l2").distance(made, wanted)
    scaled = lessons("detector", loss="l2").distance([made[0], 1000 * made[1]], [wanted[0], 1000 * wanted[1]])
    assert float(scaled) == pytest.approx(float(plain), rel=1e-5)


def test_maps_of_attention_compare_layers_of_other_widths():
    torch.manual_seed(0)
    wide, narrow = (nn.Sequential(nn.Conv2d(1, n, 3, padding=1), nn.ReLU()) for n in (6, 2))
    with torch.no_grad():
        for part in ("weight", "bias"):  # the same two channels, each three times
            getattr(wide[0], part).copy_(getattr(narrow[0], part).repeat_interleave(3, 0))
    ours, theirs = Maps(narrow, ["0"]), Maps(wide, ["0"])
    x = torch.randn(2, 1, 8, 8)
    narrow(x), wide(x)
    assert float(ours.away(theirs)) == pytest.approx(0, abs=1e-9)
    wide(torch.randn(2, 1, 8, 8))
    assert float(ours.away(theirs)) > 1e-4
    wide(x[..., :6])
    with pytest.raises(UserError, match=r"'0' has maps of \[8, 8\] and \[8, 6\]"):
        ours.away(theirs)
    with pytest.raises(UserError, match="the network has no layer 'conv'"):
        Maps(narrow, ["conv"])


def test_queries_in_another_order_are_no_distance():
    torch.manual_seed(0)
    answers = torch.randn(2, 6, 3), torch.rand(2, 6, 4)  # classes and boxes of six queries
    order = torch.randperm(6)
    learner, teacher = (Said([t[:, rows] for t in answers]) for rows in (order, torch.arange(6)))

    def apart(unordered: bool) -> float:
        (found,) = Lessons(SimpleNamespace(unordered=unordered), teacher, "l2").learners(learner)
        return float(found.loss({"images": torch.zeros(2)}))

    assert apart(unordered=True) == 0
    assert apart(unordered=False) > 0.5


class Said(nn.Module):
    """A network with one answer."""

    def __init__(self, answers: list[torch.Tensor]) -> None:
        super().__init__()
        self.answers = tuple(answers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.answers


def test_images_without_labels_are_shown_to_both(tmp_path):
    bare = {"image_folder": {"path": str(folder_of_images(tmp_path)), "labels": False, "channels": 1}}
    artifact, split = model_of(RESNET), plugin.build(bare, "data").read()
    step = plugin.build({"adapt.qat": {"data": bare, "held_out_examples": 0}})
    step.check_base(artifact)
    batch = Lessons(artifact.model, nn.Identity(), "kl").batch(split.train[:3], np.random.default_rng(0), "none", None)
    assert batch["images"].shape == (3, 1, 32, 32)
    with pytest.raises(UserError, match="held-out examples have no labels to watch the training"):
        plugin.build({"adapt.qat": {"data": bare}}).check_base(artifact)
    settings = {"data": bare, "held_out_examples": 0, "teacher": str(tmp_path), "label_weight": 0.5}
    with pytest.raises(UserError, match="has no label to learn from"):
        plugin.build({"adapt.distill": settings}).check_base(artifact)


def folder_of_images(folder: Path) -> Path:
    for part, n in (("train", 4), ("val", 2)):
        (folder / "images" / part).mkdir(parents=True)
        for i in range(n):
            image = np.full((32, 32), 30 * i + n, np.uint8)
            Image.fromarray(image).save(folder / "images" / part / f"{i}.png")
    return folder / "images"


@pytest.mark.parametrize("entry", [RESNET, FCOS, EDSR])
def test_a_network_comes_nearer_to_its_teacher(entry, tmp_path):
    teacher, before = model_of(entry, 1), model_of(entry)
    for name in ("teacher", "made"):
        (tmp_path / name).mkdir()
    teacher.save(tmp_path / "teacher")
    data = DATA[before.model.kind]
    settings = {"data": data, "max_steps": 8, "batch_size": 2, "learning_rate": 3e-3, "held_out_examples": 0}
    step = plugin.build({"adapt.distill": {**settings, "teacher": str(tmp_path / "teacher")}})
    step.check_base(before)
    after = step.apply(before, tmp_path / "made", CPU)
    curve = [value for _, value in after.notes["training"]["loss"]]
    assert np.mean(curve[-2:]) < np.mean(curve[:2])
    assert after.notes["training"]["teacher"] == str(tmp_path / "teacher")
    assert after.notes["weights_moved_by"] > 0


def test_labels_and_feature_maps_join_the_loss():
    artifact = model_of(RESNET)
    split = plugin.build("digits", "data").read()
    with artifact.open("cpu") as loaded, model_of(RESNET, 1).open("cpu") as teacher:
        batch = artifact.model.batch(split.train[:8], np.random.default_rng(0), "none", None)

        def loss(**settings: Any) -> float:
            made = Lessons(artifact.model, teacher.module, "kl", **settings)
            return float(made.learners(loaded.module)[0].loss(batch))

        plain, own = loss(), float(artifact.model.learners(loaded.module)[0].loss(batch))
        assert loss(label_weight=0.25) == pytest.approx(0.75 * plain + 0.25 * own, rel=1e-5)
        more = [loss(features=("layer1",), feature_weight=w) - plain for w in (1.0, 2.0)]
        assert more[1] == pytest.approx(2 * more[0], rel=1e-3)
        assert more[0] > 0


# Teachers.


def test_a_teacher_is_the_base_a_stage_of_the_run_or_a_folder(tmp_path):
    artifact = model_of(RESNET)
    run = tmp_path / "run"
    (run / "1-adapt.train").mkdir(parents=True)
    artifact.save(run / "1-adapt.train")
    for name in ("1-adapt.train", str(run / "1-adapt.train")):
        assert teacher_of(name, artifact, run / ".2-adapt.distill.partial", CPU).weights == artifact.weights
    assert teacher_of("base", artifact, run, CPU).weights == artifact.weights
    with pytest.raises(UserError, match=r"'2-adapt\.train' is no stage of this run; 1-adapt\.train"):
        teacher_of("2-adapt.train", artifact, run / "x", CPU)
    with pytest.raises(UserError, match="is a classifier, and this network is a super-resolution"):
        teacher_of("1-adapt.train", model_of(EDSR), run / "x", CPU)


def test_a_teacher_that_sees_or_answers_otherwise_is_refused():
    artifact = model_of(RESNET)
    split = plugin.build("digits", "data").read()
    for change, told in (
        ({"mean": [0.1]}, "makes another input of an image"),
        ({"classes": 9}, r"answers with \[\[1, 9\]\] for one input, and the network with \[\[1, 10\]\]"),
    ):
        other = model_of({"timm_classifier": {**RESNET["timm_classifier"], **change}})
        with other.open("cpu") as teacher, artifact.open("cpu") as loaded, pytest.raises(UserError, match=told):
            check_alike(teacher, artifact.model, loaded.module, split.train, split.classes)


@pytest.mark.parametrize("by_weights", [True, False], ids=["weights name them", "data names them"])
def test_a_teacher_of_other_classes_is_refused(by_weights):
    def named(*labels: str) -> Artifact:
        its = {**RESNET["timm_classifier"], "classes": 3, "label_names": labels if by_weights else ()}
        return replace(model_of({"timm_classifier": its}), notes={"data": {"classes": list(labels)}})

    classes = "cat", "dog", "horse"
    ours = named(*classes)
    for labels, told in (
        (("cat", "horse", "dog"), "output 1 of the teacher is 'horse', and that of the network 'dog'"),
        (("ant", "bee", "fly"), "output 0 of the teacher is 'ant'"),
        (("Cat", "dog", "pony"), None),  # another word
    ):
        with named(*labels).open("cpu") as teacher, ours.open("cpu") as loaded:
            refused = pytest.raises(UserError, match=told) if told else nullcontext()
            with refused:
                check_alike(teacher, ours.model, loaded.module, [], classes)


@pytest.mark.parametrize(
    ("entry", "settings", "told"),
    [
        (RESNET, {"data": "digits"}, "random weights, and so nothing to teach; set model.weights, or name a teacher"),
        (RESNET, {"teacher": "1-adapt.train"}, "it needs 'data' to be shown"),
        (TWO_STAGES, {"teacher": "1-adapt.train", "data": DATA["detector"]}, "those of two networks are no pairs"),
        (
            FCOS,
            {"teacher": "1-adapt.train", "data": DATA["detector"], "crop": 24},
            "a detector learns from whole images",
        ),
        (EDSR, {"teacher": "1-adapt.train", "loss": "kl"}, "kl compares the classes of a classifier"),
        ({"dcgan": {}}, {"data": "digits"}, "a gan is taught on latents that it draws; leave 'data' out"),
        ({"dcgan": {}}, {"augment": "flip"}, "a gan is taught on latents that it draws; leave 'augment' out"),
        (EDSR, {"teacher": "1-adapt.train", "temperature": 2.0}, "temperature is read by kl alone"),
    ],
)
def test_what_cannot_teach_is_said_before_anything_runs(entry, settings, told):
    with pytest.raises(UserError, match=told):
        plugin.build({"adapt.distill": settings}).check_base(Artifact(plugin.build(entry, "models").resolved(), None))


def test_a_weight_of_no_features_is_refused():
    with pytest.raises(UserError, match="feature_weight is read for features alone"):
        plugin.build({"adapt.qat": {"data": "digits", "feature_weight": 2.0}}).check()


def test_a_recipe_names_a_stage_that_is_there_before_the_step(tmp_path):
    def load(teacher: str) -> None:
        steps = [
            {"adapt.train": {"data": "digits"}},
            {"prune.channels": {"ratio": 0.5}},
            {"adapt.distill": {"data": "digits", "teacher": teacher}},
        ]
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": RESNET, "steps": steps, "evaluate": ["size"]}))
        recipe.load(str(tmp_path / "job.yaml"))

    load("1-adapt.train")
    with pytest.raises(UserError, match=r"teacher '3-adapt\.distill' is neither base, nor a stage before this step"):
        load("3-adapt.distill")
    with pytest.raises(UserError, match=r"did you mean '1-adapt\.train'"):
        load("1-adapt.trian")


# Quantization-aware training.

ALONE = r"the rounding alone has top1 0\.\d{3} on 8 held-out images, and 0\.\d{3} after the training \(.*\)"


def test_what_a_training_adds_to_the_rounding_alone_is_told_in_pairs():
    from llmq.adapt.qat import _told
    from llmq.statistics.proportions import Table, difference

    before, after = (1.0,) * 70 + (0.0,) * 30, (1.0,) * 95 + (0.0,) * 5
    _, (low, high) = difference(Table.of(after, before))
    told = _told(("top1", Samples(before)), ("top1", Samples(after)))["finding"]
    gain = f"(+0.250, 95 % {low:+.3f} to {high:+.3f})"
    assert told == f"the rounding alone has top1 0.700 on 100 held-out images, and 0.950 after the training {gain}"
    assert _told(None, None) == {}


def test_images_without_labels_or_too_few_tell_no_gain():
    from llmq.adapt.qat import _seen

    artifact = model_of(RESNET)
    images = [Example(str(i), np.zeros((8, 8, 1), np.uint8), i % 2) for i in range(9)]
    with artifact.open("cpu") as loaded:
        assert _seen(artifact.model, loaded, images[:7], None) is None
        name, samples = _seen(artifact.model, loaded, images, None)
        assert (name, len(samples.values)) == ("top1", 9)
        assert _seen(artifact.model, loaded, [replace(image, label=None) for image in images], None) is None


def quantizing(**settings: Any) -> Any:
    plain = {"data": "digits", "samples": 16, "batch_size": 16, "max_steps": 4, "learning_rate": 1e-4}
    return plugin.build({"adapt.qat": {**plain, **settings}})


def stored(artifact: Artifact) -> list[str]:
    graph = core().read_model(artifact.weights / "model.xml")
    return [o.get_element_type().get_type_name() for o in graph.get_ops() if o.get_type_name() == "Constant"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Artifact:
    """A classifier that knows digits a little; the means of a random one are not those of any data."""
    step = plugin.build({"adapt.train": {"data": "digits", "max_steps": 30, "held_out_examples": 0}})
    return step.apply(model_of(RESNET), tmp_path_factory.mktemp("trained"), CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kind"), [(8, "i8"), (4, "i4")])
def test_a_network_that_learned_to_be_rounded_is_a_graph_of_integers(trained, bits, kind, tmp_path):
    base = trained
    stage = quantizing(bits=bits, held_out_examples=8).apply(base, tmp_path, CPU)
    assert (stage.runtime, stage.packed) == ("openvino", True)
    layers = [m for m in base.model.network().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert stored(stage).count(kind) == len(layers)
    assert stage.notes["size_ratio"] > 1
    assert stage.notes["training"]["metric"] == "top1"
    assert re.fullmatch(ALONE, stage.notes["finding"])
    facts = json.loads((tmp_path / "layers.json").read_text())
    assert len(facts) == len(layers)
    assert {its["bits"] for its in facts.values()} == {bits}
    stage.save(tmp_path)
    assert Artifact.load(tmp_path).notes["bits"] == bits


def test_logits_that_learned_by_their_chances_are_judged_by_these():
    from llmq.vision.exporting import chances
    from llmq.vision.likeness import Likeness

    logits = 5 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    shifted = logits + 30 * torch.randn(16, 1, generator=torch.Generator().manual_seed(1))  # of no effect on chances
    plain, judged = Likeness(), Likeness()
    plain.add(logits, shifted)
    judged.add(chances(logits), chances(shifted))
    assert plain.is_garbage
    assert judged.kept > 0.999


class Gated(nn.Module):
    """Layers that round otherwise than plain ones: one image a channel, and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite, self.last = (nn.Conv2d(i, o, 1) for i, o in ((16, 8), (8, 16), (16, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.stem(x).relu()).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        made: torch.Tensor = self.last(x)
        return made


GATED: Any = SimpleNamespace(
    title="gated", any_size=False, unordered=False, deployed=lambda n: n, example=lambda n: torch.rand(n, 1, 16, 16)
)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_have_other_bits_and_files_are_foretold(bits, tmp_path):
    from llmq.vision.exporting import write_graph
    from llmq.vision.fake_quantized import graph_of, rounding
    from llmq.vision.graph_sizing import graph_bytes

    torch.manual_seed(0)
    network = Gated()
    rounded = rounding(network, [GATED.example(2)], bits, "performance", ())
    graph = graph_of(rounded, GATED)
    levels = {o.get_attributes()["levels"] for o in graph.get_ops() if o.get_type_name() == "FakeQuantize"}
    assert levels == {256}  # of activations, those before the layer of one image a channel as well
    write_graph(graph, tmp_path / "model.xml", False)
    constants = (tmp_path / "model.bin").stat().st_size
    files = constants + (tmp_path / "model.xml").stat().st_size
    told = graph_bytes(GATED, network, bits, True)
    assert told == (pytest.approx(files, rel=0.12), pytest.approx(constants, rel=0.02))  # names in the text vary


@pytest.mark.slow
@pytest.mark.parametrize("entry", [FCOS, {"edsr": {"n_feats": 48, "n_resblocks": 2, "scale": 2}}])
def test_detectors_and_super_resolution_learn_to_be_rounded(entry, tmp_path):
    base = model_of(entry)
    data = DATA[base.model.kind]
    if base.model.kind == "detector":  # the means of a random network are not those of any data
        training = {"data": data, "max_steps": 25, "batch_size": 4, "held_out_examples": 0}
        (tmp_path / "trained").mkdir()
        base = plugin.build({"adapt.train": training}).apply(base, tmp_path / "trained", CPU)
    step = quantizing(data=data, samples=4, batch_size=2, held_out_examples=0, max_steps=1, learning_rate=1e-7)
    step.check_base(base)
    (tmp_path / "made").mkdir()
    stage = step.apply(base, tmp_path / "made", CPU)
    assert "i8" in stored(stage)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(trained, tmp_path, monkeypatch):
    base = trained
    step = quantizing(save_steps=2, held_out_examples=0)
    whole = step.apply(base, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:

        def save_and_die(run, at, history, save=loop.Run.save):
            save(run, at, history)
            raise KeyboardInterrupt

        patch.setattr(loop.Run, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            step.apply(base, tmp_path / "killed", CPU)
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-2").exists()
    again = step.apply(base, tmp_path / "killed", CPU)
    for one, other in zip(whole.weight_files(), again.weight_files(), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert whole.notes["training"]["loss"] == again.notes["training"]["loss"]


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"ignored: the network has no layer 'layer9'; did you mean 'layer"):
        quantizing(ignored=["layer9"]).apply(model_of(RESNET), tmp_path, CPU)

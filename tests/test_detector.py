"""Detectors of torchvision and of transformers: taken apart, trained, kept, and the same as the libraries' own."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU
from safetensors.torch import save_file
from torchvision.models import detection

from llmq import plugin
from llmq.errors import LlmqError, UserError
from llmq.vision.detector import moved
from llmq.vision.family import Training
from llmq.vision.images import Example, make_split
from llmq.vision.loop import Run
from llmq.vision.state import open_network, save_network

SMALL = [("fcos", "small"), ("retinanet", "small"), ("faster_rcnn", "small")]
LARGE = [
    ("ssdlite", None),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (("fcos", "resnet18"), ("faster_rcnn", "mobilenet_v3_large"))
    ),
]


def model_of(word: str = "torchvision_detector", **settings: Any) -> Any:
    """A model, checked as a recipe does."""
    model: Any = plugin.build({word: settings}, "models")
    model.check()
    return model


def opened(model: Any, network: Any = None) -> Any:
    """A network in evaluation mode, as `detect` takes it."""
    torch.manual_seed(0)
    return SimpleNamespace(module=(network or model.network()).eval(), device="cpu")


def some_images(*shapes: tuple[int, int]) -> list[Any]:
    """Noise of these heights and widths."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def some_examples(n: int = 4, size: int = 64, classes: int = 3) -> list[Example]:
    """Bright squares on dark noise; the label is the colour channel."""
    rng = np.random.default_rng(1)
    examples = []
    for k in range(n):
        image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        x, y = rng.integers(0, size - 24, 2)
        image[y : y + 24, x : x + 24, k % classes] = 255
        box = np.array([[x, y, x + 24, y + 24]], np.float32)
        examples.append(Example(f"{k}", image, boxes=box, labels=np.array([k % classes])))
    return examples


def same(found: Any, theirs: Any, background: int) -> None:
    """Detections equal what torchvision returns, to the last bit."""
    assert len(found.scores) > 0
    for name in ("boxes", "scores"):
        assert np.array_equal(getattr(found, name), theirs[name].numpy())
    assert np.array_equal(found.labels, theirs["labels"].numpy() - background)


@pytest.mark.parametrize(("architecture", "backbone"), SMALL + LARGE)
def test_detections_are_torchvisions_own(architecture, backbone):
    size = None if architecture == "ssdlite" else 128
    model = model_of(architecture=architecture, backbone=backbone, classes=5, size=size, score_threshold=0.001)
    images = some_images((120, 90), (64, 100))
    ours = opened(model)
    whole = model._whole().eval()
    whole.load_state_dict(ours.module.state_dict())
    with torch.inference_mode():
        theirs = whole([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])
    for found, their in zip(model.detect(ours, images), theirs, strict=True):
        same(found, their, model._background)


@pytest.mark.parametrize(("architecture", "backbone"), SMALL)
def test_losses_are_torchvisions_own(architecture, backbone):
    model = model_of(architecture=architecture, backbone=backbone, classes=3, size=64)
    examples = some_examples()
    torch.manual_seed(0)
    network = model.network()
    whole = model._whole()
    whole.load_state_dict(network.state_dict())
    batch = model.batch(examples, np.random.default_rng(0), "none", None)
    (learner,) = model.learners(network.train())
    torch.manual_seed(1)  # Faster R-CNN learns from a sample of its proposals
    ours = learner.loss(batch)
    images = [torch.from_numpy(e.image).permute(2, 0, 1) / 255 for e in examples]
    labels = [torch.from_numpy(e.labels) + model._background for e in examples]
    targets = [{"boxes": torch.from_numpy(e.boxes), "labels": n} for e, n in zip(examples, labels, strict=True)]
    whole.train().transform.eval()  # to choose among one size it would draw a random number
    torch.manual_seed(1)
    theirs = sum(whole(images, targets).values())
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_the_small_fcos_is_as_small_as_it_says():
    network = model_of().network()
    assert sum(p.numel() for p in network.parameters()) == 396_007
    with torch.inference_mode():
        shapes = [tuple(t.shape) for t in network.eval()(model_of().example(2))]
    assert shapes == [(2, 256, 1), (2, 256, 4), (2, 256, 10)]  # 16 x 16 places at stride 8


@pytest.mark.slow
def test_a_detector_learns_and_is_reopened_the_same(tmp_path):
    model = model_of(classes=3, size=64)
    examples = some_examples(24)
    training = Training(8, 4e-3, "", max_steps=40, warmup_steps=4, channels_last=True, eval_steps=40, save_steps=99)
    with model.base(CPU).open("cpu") as loaded:
        history = Run(loaded.artifact.model, loaded, training, tmp_path).train(examples, examples[:8])
        save_network(loaded.module, tmp_path)
        (before,) = model.detect(loaded, [examples[0].image])
    assert history["metric"] == "map50"
    assert history["held_out"][-1][1] > 0.6
    again = opened(model, open_network(model.network(), tmp_path))
    (found,) = model.detect(again, [examples[0].image])
    assert np.array_equal(found.boxes, before.boxes)
    assert np.array_equal(found.scores, before.scores)


def test_weights_of_older_torchvision_are_taken_and_strange_ones_named(tmp_path):
    model = model_of(architecture="retinanet", classes=3, size=64)
    torch.manual_seed(3)
    state = model.network().state_dict()
    # Its first version had every other module a ReLU: conv.2.weight is now conv.1.0.weight.
    old = {
        re.sub(r"head\.conv\.(\d)\.0\.", lambda m: f"head.conv.{2 * int(m[1])}.", name): tensor
        for name, tensor in state.items()
    }
    assert set(old) != set(state)
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, file)
    given = model_of(architecture="retinanet", classes=3, size=64, weights=str(file)).pretrained()
    assert all(torch.equal(given[name], tensor) for name, tensor in state.items())
    other = model_of(architecture="retinanet", classes=4, size=64, weights=str(file))
    with pytest.raises(UserError, match=r"head.classification_head.cls_.* and these settings make it"):
        other.pretrained()
    with pytest.raises(UserError, match=r"lacks .* tensors.* It holds .* which these settings have no place for"):
        model_of(architecture="fcos", classes=3, size=64, weights=str(file)).pretrained()


def test_coco_weights_have_their_categories_and_fixed_normalisation():
    model = model_of(architecture="fcos", backbone="resnet50", weights="COCO_V1")
    assert model.class_count() == 91
    assert model.class_names()[1] == "person"
    assert model.source() == "torchvision COCO_V1"
    ssd = model_of(architecture="ssd", weights="COCO_V1")
    assert ssd.class_count() == 90
    assert ssd.class_names()[0] == "person"
    with torch.device("meta"):
        ours = model.network().state_dict()
        theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items() if "num_batches" not in n}


def test_faster_rcnn_says_that_it_has_no_graph():
    model = model_of(architecture="faster_rcnn", classes=3, size=64)
    network = model.network().eval()
    with pytest.raises(UserError, match="faster_rcnn has no graph of OpenVINO"):
        torch.jit.trace(network, model.example(1))
    boxes, labels, scores = network(model.example(2))
    assert boxes.shape == (2, 100, 4)
    assert labels.shape == scores.shape == (2, 100)


def test_faster_rcnn_answers_alike_whatever_image_came_first():
    model = model_of(architecture="faster_rcnn", classes=3, size=64)
    images = model.example(1), model.example(1)
    images[0][:, :, 24:] = 0  # a wide image, padded to the square
    torch.manual_seed(0)
    network = model.network().eval()
    again = copy.deepcopy(network)
    with torch.inference_mode():
        network(images[0])
        for found, truth in zip(network(images[1]), again(images[1]), strict=True):
            assert torch.equal(found, truth)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet19"}, "backbone 'resnet19' is none of fcos: small, resnet18"),
        ({"architecture": "ssd", "backbone": "small"}, "backbone 'small' is none of ssd: vgg16"),
        ({"architecture": "ssd", "size": 128}, "size 128: ssd takes images of 300 only"),
        ({"weights": "COCO_V1"}, "weights 'COCO_V1': there are none for fcos on small"),
        ({"weights": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(UserError) as error:
        model_of(**settings)
    assert str(error.value).startswith(message)


def test_data_that_does_not_fit_is_refused():
    model = model_of(classes=3)
    with pytest.raises(UserError, match="the data has 4 classes, and this network has 3"):
        model.check_split(make_split([], [], "image/boxes", [], "abcd"))
    with pytest.raises(UserError, match="its examples are image/label, and image/boxes is needed"):
        model.check_split(make_split([], [], "image/label", [], "abc"))


@pytest.mark.parametrize("augment", ["none", "flip", "dihedral"])
def test_boxes_move_with_their_image(augment):
    (example,) = some_examples(1)
    seen = set()
    for seed in range(60):
        image, boxes = moved(example.image[:50], example.boxes, np.random.default_rng(seed), augment)
        x0, y0, x1, y1 = boxes[0].astype(int)
        assert (image[y0:y1, x0:x1, 0] == 255).mean() > 0.6  # the lowest rows may be cut off
        inside = np.zeros(image.shape[:2], bool)
        inside[max(y0, 0) : y1, max(x0, 0) : x1] = True
        assert not (image[..., 0] == 255)[~inside].any()
        seen.add((image.shape, tuple(boxes[0])))
    assert len(seen) == {"none": 1, "flip": 2, "dihedral": 8}[augment]


def test_an_image_of_which_nothing_would_be_left_is_refused():
    model: Any = plugin.build({"torchvision_detector": {}}, "models")
    assert model.fit([np.zeros((1, 128, 3), np.uint8)])[1] == [(1, 128)]
    with pytest.raises(UserError, match="an image of 2 x 300 pixels is too long for a square of 128"):
        model.fit([np.zeros((8, 8, 3), np.uint8), np.zeros((300, 2, 3), np.uint8)])


def test_a_box_at_the_edge_of_an_empty_scene_is_learned_from_without_nan():
    model = model_of(classes=3, size=64)
    examples = some_examples(2)
    none = Example("none", examples[0].image, boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64))
    (learner,) = model.learners(model.network().train())
    for chosen in ([none, none], [none, examples[1]]):
        loss = learner.loss(model.batch(chosen, np.random.default_rng(0), "flip", None))
        assert torch.isfinite(loss)


def test_a_detector_that_answers_no_numbers_is_no_detector_that_finds_nothing():
    model = model_of(size=64, classes=3)
    loaded = opened(model)
    with torch.no_grad():
        next(loaded.module.parameters()).fill_(float("nan"))
    with pytest.raises(LlmqError, match=r"models\.torchvision_detector: .* numbers that are not finite"):
        model.detect(loaded, some_images((64, 64)))


def test_training_is_watched_on_examples_that_have_boxes(monkeypatch):
    bare = [Example("x", some_images((64, 64))[0], boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, int))] * 3
    split = make_split(some_examples(), bare, "image/boxes", ["x"], ["r", "g", "b"])
    step: Any = plugin.build({"adapt.train": {"data": "scenes"}})
    monkeypatch.setattr(type(step.data), "read", lambda self: split)
    with pytest.raises(UserError, match="the first 3 held-out examples have no box to watch the training"):
        step.check_base(SimpleNamespace(model=model_of(size=64, classes=3)))

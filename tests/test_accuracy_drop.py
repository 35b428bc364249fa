"""quantize.int8 with `accuracy_drop`: our own figure and paired interval decide; layers go back to float."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.quantize.int8 import told_by
from llmq.statistics.compare import paired_intervals
from llmq.statistics.figures import stretches
from llmq.types import Context, Samples
from llmq.vision import apart
from llmq.vision.accuracy_control import METRICS, Judge, Ran, precision
from llmq.vision.average_precision import THRESHOLDS, Match, mean_average_precision
from llmq.vision.degrade import Disturbance
from llmq.vision.detector import Detections
from llmq.vision.exporting import export
from llmq.vision.images import Example
from llmq.vision.state import save_network

CPU = Context("cpu", 0)
RESNET = {"timm_classifier": {"architecture": "resnet10t", "classes": 10, "channels": 1, "input_size": 32}}


class Compiled:
    """A graph that tells the brightness of an image, for two classes; some images are told wrongly."""

    def __init__(self, wrong: set[int] = frozenset(), alone: bool = False) -> None:
        self.wrong, self.seen = wrong, 0
        self.inputs = [SimpleNamespace(partial_shape=[SimpleNamespace(is_static=alone)])]

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        rows = [[-1.0, 1.0] if (v > 0.5) != (int(v * 1e4) in self.wrong) else [1.0, -1.0] for v in x[:, 0, 0, 0]]
        return {"logits": np.array(rows, np.float32)}


class Bright:
    """A family of classifiers whose images are one pixel."""

    kind = "classifier"

    def prepare(self, images: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(images)).reshape(-1, 1, 1, 1).float()

    def logits(self, loaded: Any, images: list[np.ndarray]) -> torch.Tensor:
        return loaded.module(self.prepare(images))


def examples(n: int) -> list[Example]:
    values = (np.arange(n) + 0.5) / n
    return [Example(str(i), np.float64(v).reshape(1), int(v > 0.5)) for i, v in enumerate(values)]


def places(shown: list[Example], rows: range) -> set[int]:
    return {int(np.float32(shown[i].image[0]) * 1e4) for i in rows}


def judge_of(n: int, bound: float) -> Judge:
    judge = Judge(Bright(), {"top1": bound}, examples(n))
    assert judge(Compiled(), [0])[0] == 1  # NNCF looks at one answer first
    assert judge(Compiled(), range(n))[0] == 1
    return judge


def test_what_nncf_compares_with_the_bound_is_the_upper_end_of_the_paired_interval():
    judge = judge_of(1000, 0.02)
    wrong = Compiled(places(judge.examples, range(100, 107)))
    value, outputs = judge(wrong, range(1000))
    base = Samples(tuple([1.0] * 1000))
    stage = Samples(tuple(float(not 100 <= i < 107) for i in range(1000)))
    (_, high), _ = paired_intervals(base, stage)
    assert 1 - value == pytest.approx(high / 0.02)
    assert judge.first["top1"]["drop"] == pytest.approx(0.007)
    assert high > 0.007
    assert len(outputs) == 1000
    assert outputs[3][0].shape == (1, 2)


def test_too_few_images_for_a_bound_are_refused_before_layers_are_ranked():
    with pytest.raises(UserError, match=r"100 images tell no drop of top1 under 0\.03, and 0\.003 is asked for"):
        judge_of(100, 0.003)
    judge_of(1000, 0.003)


def test_a_bound_that_nothing_reaches_is_an_error():
    judge = judge_of(1000, 0.01)
    wrong = Compiled(places(judge.examples, range(100, 150)))
    with pytest.raises(LlmqError, match=r"with 0 layers back in float top1 still drops by 0\.05 \(.*, and 0\.01 is"):
        judge.told(wrong, SimpleNamespace(get_ordered_ops=list), [])


def test_a_bound_that_takes_every_layer_back_is_told_with_the_drop_of_int8(monkeypatch):
    from llmq.vision import accuracy_control

    judge = judge_of(1000, 0.01)
    judge(Compiled(places(judge.examples, range(100, 150))), range(1000))
    monkeypatch.setattr(accuracy_control, "float_layers", lambda graph, layers: {"a": 9, "b": 9})
    told = r"all 2 layers went back to float, .*: top1 dropped by 0\.05 \(.*\) with all in int8, and 0\.01 is allowed"
    with pytest.raises(LlmqError, match=told):
        judge.told(Compiled(), SimpleNamespace(get_ordered_ops=list), ["a", "b"])
    assert judge.told(Compiled(), SimpleNamespace(get_ordered_ops=list), ["a", "b", "c"])["back_to_float"] == ["a", "b"]


def test_a_graph_for_one_image_is_shown_one_at_a_time():
    x = torch.rand(5, 1, 1, 1)
    assert torch.equal(Ran(Compiled(alone=True))(x), Ran(Compiled())(x))


def test_the_precision_that_decides_is_that_of_the_report():
    rng = np.random.default_rng(0)
    shown, found = [], []
    for i in range(12):
        corners = rng.uniform(0, 40, (4, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 20, (4, 2))], 1).astype(np.float32)
        labels = rng.integers(0, 3, 4)
        shown.append(Example(str(i), np.zeros((64, 64, 3), np.uint8), boxes=boxes, labels=labels))
        moved = (boxes + rng.normal(0, 2, boxes.shape)).astype(np.float32)
        found.append(Detections(moved, rng.random(4).astype(np.float32), labels))
    model = SimpleNamespace(kind="detector", detect=lambda loaded, images: found)
    for name, thresholds in (("map", THRESHOLDS), ("map50", (0.5,))):  # themselves checked against torchmetrics
        matches = [Match.of(e, d, thresholds) for e, d in zip(shown, found, strict=True)]
        samples = METRICS["detector"][name](model, None, shown)
        assert np.mean(samples.values) == pytest.approx(mean_average_precision(matches))
    with pytest.raises(UserError, match="too few of its images have boxes"):
        precision(SimpleNamespace(detect=lambda loaded, images: found[:1]), None, shown[:1], slice(None))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accuracy_drop": {"map": 0.01}}, "'map' is no metric of a classifier; top1"),
        ({"accuracy_drop": {"top1": "1pt"}, "samples": 2000}, "0 training images of data.digits, without those"),
    ],
)
def test_what_cannot_decide_is_said_before_anything_runs(settings, told):
    step = plugin.build({"quantize.int8": {"data": "digits", **settings}})
    with pytest.raises(UserError, match=told):
        step.check_base(Artifact(plugin.build(RESNET, "models").resolved(), None))


def test_points_are_hundredths_and_data_alone_is_refused():
    step = plugin.build({"quantize.int8": {"data": "digits", "accuracy_drop": {"top1": "0.3pt", "psnr": 0.1}}})
    assert step.accuracy_drop == {"top1": pytest.approx(0.003), "psnr": 0.1}
    with pytest.raises(ValueError, match="greater than 0"):
        plugin.build({"quantize.int8": {"accuracy_drop": {"top1": "-1pt"}}})
    for name, value in (("accuracy_data", "digits"), ("accuracy_samples", 50)):
        with pytest.raises(UserError, match=f"{name} is read for accuracy_drop alone"):
            plugin.build({"quantize.int8": {name: value}}).check()


def test_images_that_judge_calibrate_nothing_and_are_of_the_training_part():
    step = plugin.build({"quantize.int8": {"data": "digits", "accuracy_drop": {"top1": 0.01}, "accuracy_samples": 900}})
    judging = step._judging(Artifact(plugin.build(RESNET, "models").resolved(), None), 3)
    n = len(step.data.read().train)
    calibrate = set(np.random.default_rng(3).permutation(n)[:100].tolist())
    assert len(judging["rows"]) == 900
    assert not calibrate & set(judging["rows"])
    assert max(judging["rows"]) < n
    assert judging["what"].startswith("900 training images of data.digits, without those that calibrated")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Artifact:
    """A trained classifier, one of whose tensors holds a channel 300 times as large as all others."""
    model = plugin.build({"timm_classifier": {**RESNET["timm_classifier"], "model_args": NARROW}}, "models")
    training = plugin.build({"adapt.train": {"data": "digits", "max_steps": 60, "held_out_examples": 0}})
    folder = tmp_path_factory.mktemp("spoilt")
    trained = training.apply(model.base(CPU), folder, CPU)
    with trained.open("cpu") as loaded, torch.no_grad():
        # What a channel gains in front of a sum, the layers after the sum take back: NNCF aligns no such channels.
        block, after = loaded.module.layer1[0], loaded.module.layer2[0]
        block.bn2.weight[0] *= 300
        block.bn2.bias[0] *= 300
        for name, layer in after.named_modules():
            if isinstance(layer, torch.nn.Conv2d) and name.startswith(("conv1", "downsample")):
                layer.weight[:, 0] /= 300
        save_network(loaded.module, folder)
    return trained


NARROW = {"channels": [16, 24, 32, 48]}
SETTINGS = {"data": "digits", "accuracy_samples": 600, "samples": 40}


@pytest.mark.slow
def test_layers_go_back_to_float_until_the_interval_lies_within_the_bound(spoilt):
    step = plugin.build({"quantize.int8": {**SETTINGS, "accuracy_drop": {"top1": "2pt"}}})
    model, split = spoilt.model, step.data.read()
    inputs = list(model.calibration(split, step.samples, 0))
    with spoilt.open("cpu") as loaded:
        graph = export(loaded.module, model)
    # Not as a stage: of so small a network hardly a layer stays int8, and a stage must shrink.
    told = told_by(apart.changed(step, model.title, graph, inputs, step._judging(spoilt, 0)))
    assert told["drop_before"]["top1"]["ci95"][1] > 0.02 >= told["drop_after"]["top1"]["ci95"][1]
    assert told["images"] == 600
    assert told["back_to_float"]
    assert told["bytes_more"] > 0
    assert math.isfinite(told["float_before"]["top1"])


def judging(entry: Any, **settings: Any) -> dict[str, Any]:
    step = plugin.build({"quantize.int8": {"accuracy_drop": {"top1": "1pt"}, **settings}})
    return step._judging(Artifact(plugin.build(entry, "models").resolved(), None), 3)


def test_images_that_calibrate_judge_nothing_where_both_settings_name_the_same_data():
    told = judging(RESNET, data="digits", accuracy_data={"digits": {}})
    n = len(plugin.build("digits", "data").read().train)
    calibrate = set(np.random.default_rng(3).permutation(n)[:100].tolist())
    assert len(told["rows"]) == n - 100
    assert not calibrate & set(told["rows"])
    assert "without those that calibrated" in told["what"]


def test_no_drop_is_told_from_a_handful_of_images_nor_from_images_without_labels(tmp_path):
    with pytest.raises(UserError, match=r"7 training images of data\.digits.*no drop is told from fewer than 8"):
        judging(RESNET, data="digits", accuracy_samples=7)
    for i in range(9):
        Image.fromarray(np.full((32, 32), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    bare = {"image_folder": {"path": str(tmp_path), "labels": False, "channels": 1}}
    with pytest.raises(UserError, match=r"the images of data\.image_folder have no labels, and no drop is told"):
        judging(RESNET, data="digits", accuracy_data=bare)


def test_a_scanned_pair_judges_as_it_calibrates():
    rock = {"rock": {"scale": 2, "size": 96, "train_slices": 9}}
    pair = plugin.build(rock, "data").read().train[0]
    noisy = replace(pair, disturbance=Disturbance(noise=(9, 9), blur=(0, 0)))
    seen = noisy.seen(np.random.default_rng([0, 1]))
    assert np.array_equal(seen.image, noisy.drawn(np.random.default_rng([0, 1])))
    assert seen.disturbance is None
    assert np.array_equal(seen.high, pair.high)


def test_neighbouring_slices_widen_the_interval_of_a_drop():
    """Slices of a volume err alike: each stretch of neighbours counts once."""
    rng = np.random.default_rng(0)
    drops = np.repeat(rng.normal(0, 1, 8), 8) + rng.normal(0, 0.1, 64)  # dB, alike within a stretch
    dbs = iter([np.full(64, 30.0), 30.0 - drops] * 2)
    model = SimpleNamespace(kind="super-resolution", prepare=None)

    def width(clusters: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> float:
        told = {"psnr": lambda model, loaded, examples: Samples(tuple(map(float, next(dbs))))}
        monkeypatch.setitem(METRICS, "super-resolution", told)
        judge = Judge(model, {"psnr": 0.1}, examples(64), clusters)
        judge.base = judge._samples(Ran(Compiled()))
        low, high = judge.drops(Ran(Compiled()))["psnr"]["ci95"]
        return high - low

    with pytest.MonkeyPatch.context() as patch:
        alone = width(None, patch)
        assert width(stretches(64), patch) > 2 * alone

"""COCO's average precision: against other implementations and by hand; its jackknife; the task."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import coco, cocoeval

from llmq import plugin
from llmq.errors import UserError
from llmq.statistics.compare import compare
from llmq.tasks import detection
from llmq.types import Exhibit, Measurement
from llmq.vision.average_precision import AREAS, THRESHOLDS, Match, influences, mean_average_precision, overlap
from llmq.vision.detector import Detections
from llmq.vision.images import Example, make_split


def some_world(seed: int, images: int = 40, classes: int = 4) -> tuple[list[Example], list[Detections]]:
    """Boxes of all sizes, most of them found more or less well, some under another label, and false alarms."""
    rng = np.random.default_rng(seed)
    examples, found = [], []
    for n in range(images):
        boxes = some_boxes(rng, rng.integers(0, 7))
        labels = rng.integers(0, classes, len(boxes))
        seen = rng.random(len(boxes)) < 0.85
        near = boxes[seen] + rng.normal(0, 4, (seen.sum(), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        said = np.where(rng.random(seen.sum()) < 0.9, labels[seen], rng.integers(0, classes, seen.sum()))
        alarms = some_boxes(rng, rng.integers(0, 6))
        every = np.concatenate([near, alarms]).astype(np.float32)
        labelled = np.concatenate([said, rng.integers(0, classes, len(alarms))])
        scores = rng.random(len(every)).astype(np.float32)
        examples.append(Example(f"{n}", np.zeros((400, 400, 3), np.uint8), boxes=boxes, labels=labels))
        found.append(Detections(every, scores, labelled))
    return examples, found


def some_boxes(rng: Any, n: int) -> Any:
    """Boxes with sides of 8 to 180 pixels."""
    corner = rng.uniform(0, 200, (n, 2))
    return np.concatenate([corner, corner + np.exp(rng.uniform(np.log(8), np.log(180), (n, 2)))], 1).astype(np.float32)


def matches_of(examples: Any, found: Any, **how: Any) -> list[Match]:
    """Each image's match."""
    return [Match.of(e, f, **how) for e, f in zip(examples, found, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_precision_agrees_with_faster_coco_eval(seed):
    examples, found = some_world(seed)
    theirs = detection._torchmetrics(examples, found)
    for metric, area in detection.METRICS.items():
        ours = mean_average_precision(matches_of(examples, found, area=AREAS[area]))
        assert ours == pytest.approx(theirs[metric], abs=1e-6)
    for row, name in detection.SINGLE.values():
        assert mean_average_precision([m.at(row) for m in matches_of(examples, found)]) == pytest.approx(
            theirs[name], abs=1e-6
        )


def test_precision_agrees_with_pycocotools():
    examples, found = some_world(7)
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": n} for n in range(len(examples))],
        "categories": [{"id": c} for c in range(4)],
        "annotations": [
            {"id": 1 + 100 * n + k, "image_id": n, "category_id": int(c), "iscrowd": 0, **sized(box)}
            for n, e in enumerate(examples)
            for k, (box, c) in enumerate(zip(e.boxes, e.labels, strict=True))
        ],
    }
    truth.createIndex()
    said = truth.loadRes(
        [
            {"image_id": n, "category_id": int(c), "score": float(s), "bbox": sized(box)["bbox"]}
            for n, f in enumerate(found)
            for box, s, c in zip(f.boxes, f.scores, f.labels, strict=True)
        ]
    )
    judge = cocoeval.COCOeval(truth, said, "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    theirs = detection._torchmetrics(examples, found)
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    np.testing.assert_allclose([theirs[name] for name in names], judge.stats[:6], atol=1e-6)


# Annotations as people make them, against pycocotools itself.

SIDE = 300


def annotated_world(seed: int, images: int = 25, classes: int = 4) -> tuple[dict[str, Any], list[Detections]]:
    """A COCO file with crowds, areas that are not those of the boxes, empty images and a category without truth."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    found = []
    for n in range(images):
        boxes = np.clip(np.round(some_boxes(rng, rng.integers(0, 6) * (n % 4 > 0)), 2), 0, SIDE).astype(np.float64)
        for box in boxes:
            plain = sized(box)
            area = plain["area"] * rng.choice([1, 0.6, 0.1])  # of an outline
            crowd = int(rng.random() < 0.25)
            label = int(rng.integers(0, classes - 1))
            its = {"image_id": n, "category_id": label, "bbox": plain["bbox"], "area": area, "iscrowd": crowd}
            annotations.append({"id": len(annotations) + 1, "ignore": int(rng.random() < 0.2), **its})
        labels = [a["category_id"] for a in annotations if a["image_id"] == n]
        found.append(some_detections(rng, boxes, np.array(labels, int), classes))
    files = [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(images)]
    categories = [{"id": c, "name": f"class {c}"} for c in range(classes)]
    return {"images": files, "annotations": annotations, "categories": categories}, found


def some_detections(rng: Any, boxes: Any, labels: Any, classes: int) -> Detections:
    """Each box found twice, more or less well, with pieces of it, and false alarms; some scores are equal."""
    near = np.repeat(boxes, 2, 0) + rng.normal(0, 3, (2 * len(boxes), 4))
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2  # a quarter: much of it lies in a crowd, little overlaps an object
    every = np.concatenate([near, np.concatenate([boxes[:, :2], middle], 1), some_boxes(rng, rng.integers(0, 5))])
    every[:, 2:] = np.maximum(every[:, 2:], every[:, :2] + 1)
    scores = np.round(rng.random(len(every)), 1).astype(np.float32)
    alarms = rng.integers(0, classes, len(every) - 3 * len(boxes))
    return Detections(every.astype(np.float32), scores, np.concatenate([np.repeat(labels, 2), labels, alarms]))


def of_pycocotools(data: dict[str, Any], found: list[Detections]) -> Any:
    """Its six average precisions; -1 where there is none."""
    truth = coco.COCO()
    truth.dataset = json.loads(json.dumps(data))
    truth.createIndex()
    said = [
        {"image_id": n, "category_id": int(c), "score": float(s), "bbox": sized(box)["bbox"]}
        for n, f in enumerate(found)
        for box, s, c in zip(f.boxes, f.scores, f.labels, strict=True)
    ]
    judge = cocoeval.COCOeval(truth, truth.loadRes(said), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats[:6]


def as_read(data: dict[str, Any], folder: Path) -> list[Example]:
    """The examples that llmq makes of a COCO file, in the order of the file."""
    for n, image in enumerate(data["images"]):
        Image.new("RGB", (SIDE, SIDE), (n, 255 - n, 7)).save(folder / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(data))
    source: Any = plugin.build({"coco": {"path": str(folder / "instances.json"), "held_out": 0.5}}, "data")
    split = source.read()
    return sorted([*split.train, *split.held_out], key=lambda example: int(example.name[:-4]))


def figures_of(examples: list[Example], found: list[Detections]) -> Any:
    """The six, by our own matches; -1 where there is none."""
    matches = {area: matches_of(examples, found, area=sizes) for area, sizes in AREAS.items()}
    each = [
        matches["all"],
        *([m.at(row) for m in matches["all"]] for row in (0, 5)),
        *(matches[a] for a in ("small", "medium", "large")),
    ]
    return [mean_average_precision(its) if any(len(m.wanted) for m in its) else -1 for its in each]


@pytest.mark.parametrize("seed", range(6))
def test_annotations_are_judged_as_pycocotools_judges_them(seed, tmp_path, asked):
    data, found = annotated_world(seed)
    theirs = of_pycocotools(data, found)
    examples = as_read(data, tmp_path)
    np.testing.assert_allclose(figures_of(examples, found), theirs, atol=1e-9)
    told = {m.metric: m.value for m in asked(examples, found, examples=0)}
    names = ["map", "map50", "map75", "map_small", "map_medium", "map_large"]
    np.testing.assert_allclose([told.get(name, -1) for name in names], theirs, atol=1e-6)
    without = [replace(e, crowds=None, crowd_labels=None) for e in examples]
    assert abs(figures_of(without, found)[0] - theirs[0]) > 0.01
    assert abs(figures_of([replace(e, areas=None) for e in examples], found)[3] - theirs[3]) > 0.01


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong(tmp_path):
    box = {"image_id": 0, "category_id": 0, "iscrowd": 0, "bbox": [10, 10, 20, 20], "area": 400}
    crowd = {**box, "id": 2, "iscrowd": 1, "bbox": [100, 100, 100, 100], "area": 10_000}
    files = [{"id": 0, "file_name": "0.png", "width": SIDE, "height": SIDE}]
    data = {"images": files, "annotations": [{**box, "id": 1}, crowd], "categories": [{"id": 0, "name": "a"}]}
    inside = np.float32([[100, 100, 120, 120], [110, 110, 140, 140], [150, 150, 190, 190], [10, 10, 30, 30]])
    found = [Detections(inside, np.float32([0.9, 0.8, 0.7, 0.6]), np.zeros(4, int))]
    examples = as_read(data, tmp_path)
    assert len(examples[0].boxes) == 1  # what is learned from
    assert figures_of(examples, found)[0] == pytest.approx(1)
    assert of_pycocotools(data, found)[0] == pytest.approx(1)


def test_an_annotation_that_is_there_twice_counts_once(tmp_path):
    data, found = annotated_world(1)
    again = [{**a, "id": 1000 + a["id"]} for a in data["annotations"]]
    doubled = {**data, "annotations": [*data["annotations"], *again]}
    theirs = of_pycocotools(data, found)
    assert abs(of_pycocotools(doubled, found)[0] - theirs[0]) > 0.001
    np.testing.assert_allclose(figures_of(as_read(doubled, tmp_path), found), theirs, atol=1e-9)


def test_a_hundred_detections_of_a_class_count_in_an_image(tmp_path):
    files = [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(2)]
    its = {"category_id": 0, "iscrowd": 0, "area": 400}
    boxes = [{**its, "id": n + 1, "image_id": n, "bbox": [200, 200, 20, 20]} for n in range(2)]
    data = {"images": files, "annotations": boxes, "categories": [{"id": 0, "name": "a"}]}
    alarms = np.float32([[0, 0, 9, 9]]).repeat(150, 0)
    right = np.float32([[200, 200, 220, 220]])
    scores, labels = np.linspace(1, 0, 151, dtype=np.float32), np.zeros(151, int)
    found = [Detections(np.concatenate([alarms[:n], right, alarms[n:]]), scores, labels) for n in (99, 100)]
    ours = figures_of(as_read(data, tmp_path), found)
    np.testing.assert_allclose(ours, of_pycocotools(data, found), atol=1e-9)
    assert ours[0] == pytest.approx(51 / 101 / 199)  # the hundredth counts, after 198 alarms; the next does not


def test_no_spread_is_told_where_all_boxes_are_in_one_image(asked):
    full, empty = some_world(3, images=2)[0][:2]
    full = replace(full, boxes=np.float32([A]), labels=np.array([0]))
    empty = replace(empty, boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, int))
    found = [Detections(np.float32([A]), np.float32([0.9]), np.array([0]))] * 2
    first = asked([full, empty], found, examples=0)[0]
    assert first.value == pytest.approx(1)
    assert (first.samples, first.stderr) == (None, None)


def sized(box: Any) -> dict[str, Any]:
    """A box as COCO writes it."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}


def one(boxes: Any, labels: Any, found: Any, scores: Any, said: Any) -> Match:
    """One image's match."""
    seen = Detections(np.array(found, np.float32).reshape(-1, 4), np.array(scores), np.array(said, int))
    true = np.array(boxes, np.float32).reshape(-1, 4)
    return Match.of(Example("", np.zeros((1, 1, 3)), boxes=true, labels=np.array(labels, int)), seen)


A, B, ELSEWHERE = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 70]


def test_precision_by_hand():
    # Right, wrong, right: precision 1 up to a recall of 1/2 (51 of 101 levels), then 2/3.
    match = one([A, B], [0, 0], [A, ELSEWHERE, B], [0.9, 0.8, 0.7], [0, 0, 0])
    assert mean_average_precision([match]) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # An overlap of 0.8 passes the thresholds 0.50 to 0.80: seven of ten.
    match = one([[0, 0, 10, 10]], [0], [[0, 0, 10, 8]], [0.5], [0])
    assert overlap([[0, 0, 10, 8]], [[0, 0, 10, 10]]).item() == pytest.approx(0.8)
    assert mean_average_precision([match]) == pytest.approx(0.7)
    # A class that nobody found counts; one that is nowhere does not.
    match = one([A, B], [0, 1], [A, A], [0.9, 0.8], [0, 5])
    assert mean_average_precision([match]) == pytest.approx(0.5)


def test_all_found_is_one_and_nothing_found_is_zero():
    assert mean_average_precision([one([A, B], [0, 1], [A, B], [0.6, 0.7], [0, 1])]) == pytest.approx(1)
    assert mean_average_precision([one([A, B], [0, 1], [], [], [])]) == 0
    assert np.isnan(mean_average_precision([one([], [], [A], [0.3], [0])]))


def test_a_box_found_twice_counts_once():
    match = one([A], [0], [A, A], [0.9, 0.8], [0, 0])
    assert match.hits.sum(1).tolist() == [1] * len(THRESHOLDS)


def test_influences_are_those_of_leaving_images_out():
    matches = matches_of(*some_world(3, images=12))
    value = mean_average_precision(matches)
    each = influences(matches, value, 12)
    without = np.array([mean_average_precision(matches[:i] + matches[i + 1 :]) for i in range(12)])
    np.testing.assert_allclose(each, value + 11 * (without.mean() - without))
    assert each.mean() == pytest.approx(value)
    of_three = influences(matches, value, 3)
    without = np.array([mean_average_precision([m for j, m in enumerate(matches) if j % 3 != i]) for i in range(3)])
    np.testing.assert_allclose(of_three, value + 2 * (without.mean() - without))


@pytest.mark.slow
def test_the_jackknife_is_as_wide_as_a_bootstrap_of_images():
    matches = matches_of(*some_world(5, images=80, classes=2))
    each = influences(matches, mean_average_precision(matches), 80)
    rng = np.random.default_rng(0)
    resampled = [mean_average_precision([matches[i] for i in rng.integers(0, 80, 80)]) for _ in range(200)]
    assert each.std(ddof=1) / 80**0.5 == pytest.approx(np.std(resampled), rel=0.3)


class Oracle:
    """A model that has been told what to find."""

    score_threshold = 0.05

    def __init__(self, found: Any, names: tuple[str, ...] = ()) -> None:
        self.found, self.names = found, names

    def check_split(self, split: Any) -> None:
        """Anything goes."""

    def places(self, split: Any) -> list[int] | None:
        """Where it has the classes of the data."""
        return [self.names.index(name) for name in split.classes] if self.names else None

    def detect(self, loaded: Any, images: Any, batch_size: int) -> Any:
        """What it was told."""
        return self.found[: len(images)]


@pytest.fixture
def asked(monkeypatch):
    """Ask the task about an oracle, its data being a world of this file."""

    def ask(truth: Any, found: Any, names: tuple[str, ...] = (), **settings: Any) -> list[Any]:
        task: Any = plugin.build({"detection": settings}, "tasks")
        split = make_split([], truth, "image/boxes", ["x"], ["a", "b", "c", "d"])
        monkeypatch.setattr(type(task.data), "read", lambda self: split)
        return list(task.score(SimpleNamespace(artifact=SimpleNamespace(model=Oracle(found, names)))))

    return ask


def test_the_task_measures_with_error_and_shows_pictures(asked):
    examples, found = some_world(1, images=30)
    *figures, exhibit = asked(examples, found, examples=2)
    assert [m.metric for m in figures] == ["map", "map50", "map75", "map_small", "map_medium", "map_large"]
    for m in figures:
        assert isinstance(m, Measurement)
        assert m.n == len(m.samples.values) == 30
        assert np.mean(m.samples.values) == pytest.approx(m.value)
        assert 0 < m.stderr < 0.3
        assert "101 levels of recall" in m.convention
        assert "classes by number" in m.convention
    assert isinstance(exhibit, Exhibit)
    assert exhibit.picture.startswith(b"\x89PNG")
    assert asked(examples, found, examples=2)[-1].picture == exhibit.picture


def test_two_stages_are_compared_in_pairs(asked):
    examples, found = some_world(2, images=60)
    worse = [replace(f, scores=f.scores, boxes=f.boxes + np.float32([3, 3, 3, 3])) for f in found]
    base, stage = asked(examples, found, examples=0)[0], asked(examples, worse, examples=0)[0]
    assert compare(base, base).verdict == "same"
    assert compare(stage, base).verdict == "worse"


def test_labels_are_matched_by_name_where_names_are_known(asked):
    examples, found = some_world(1)
    others = [replace(f, labels=f.labels + 1) for f in found]  # the same classes, counted from 1
    plain = asked(examples, found, examples=0)
    named = asked(examples, others, ("background", "a", "b", "c", "d", "e"), examples=0)
    assert [m.value for m in named] == [m.value for m in plain]
    assert "classes by name" in named[0].convention


def test_sizes_that_do_not_occur_have_no_figure(asked):
    small = Example("x", np.zeros((50, 50, 3), np.uint8), boxes=np.float32([A]), labels=np.array([0]))
    metrics = [
        m.metric for m in asked([small], [Detections(np.float32([A]), np.float32([0.9]), np.array([0]))], examples=0)
    ]
    assert metrics == ["map", "map50", "map75", "map_small"]


def test_nothing_to_be_found_is_an_error(asked):
    empty = Example("x", np.zeros((50, 50, 3), np.uint8), boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, int))
    with pytest.raises(UserError, match=r"the held-out part of data\.scenes has no box to be found"):
        asked([empty], [])

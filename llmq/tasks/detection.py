"""COCO's mean average precision: over overlaps of 0.50 to 0.95, at 0.50, at 0.75, and of small to large objects.

Computed by torchmetrics over faster-coco-eval. Where labels of the model have names that the data knows, they are
matched by name, else by number. The standard error is a jackknife over images, and its influence values let two
stages be compared in pairs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord, data_of_run
from llmq.types import Exhibit, Loaded, Measurement, Samples, Split, Task
from llmq.vision.detector import Detector
from llmq.vision.family import the_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy import ndarray
    from torch import Tensor

    from llmq.sketch import Sketch, Work
    from llmq.vision.average_precision import Match
    from llmq.vision.detector import Detections
    from llmq.vision.images import Example

METRICS = {"map": "all", "map_small": "small", "map_medium": "medium", "map_large": "large"}
SINGLE = {"map50": (0, "map_50"), "map75": (5, "map_75")}
"""Metrics of one threshold: the place among the ten, and the name in torchmetrics."""
GROUPS = 256
TRUTH, FOUND = "#2fbf71", "#ff8c1a"
COLUMNS = 3


class Detection(Task[Detector]):
    suits: ClassVar[frozenset[str]] = frozenset({"detector"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = data_of_run("scenes")
    limit: PositiveInt | None = Field(None, description="held-out images at most")
    batch_size: PositiveInt = 16
    examples: int = Field(6, ge=0, description="images shown with what was found")
    shown_from: float = Field(0.4, ge=0, le=1, description="score from which a detection is drawn")

    def check_base(self, base: Artifact[Detector]) -> None:
        self._examples(base)

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over the held-out images, a batch at a time."""
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected(), self.limit, self.batch_size)

    def score(self, loaded: Loaded[Detector]) -> Iterable[Measurement | Exhibit]:
        split, examples = self._examples(loaded.artifact)
        model = loaded.artifact.model
        places = model.places(split)
        detections = together.answers_of(partial(_share_of_detections, self, split.sha256), [loaded])
        if places is not None:
            numbers = {place: number for number, place in enumerate(places)}
            detections = [_renumbered(each, numbers) for each in detections]
        protocol = (
            "COCO: 101 levels of recall, 100 detections of a class an image, classes of equal weight; crowds ignored, "
            "annotated areas, small below 32^2 pixels, large above 96^2; "
            f"scores from {model.score_threshold:g}; classes by {'number' if places is None else 'name'}; "
            f"{self.data.word} held_out, sha256 {split.sha256[:12]}"
        )
        yield from self._measurements(examples, detections, protocol)
        if self.examples:
            shown = list(zip(examples, detections, strict=True))[: self.examples]
            yield Exhibit(
                self.name,
                "Detections",
                input=f"{len(shown)} of {len(examples)} held-out images",
                output=f"orange: found, score of {self.shown_from:g} and more",
                reference="green: the truth",
                picture=picture(shown, split.classes, self.shown_from),
            )

    def _examples(self, artifact: Artifact[Detector]) -> "tuple[Split, list[Example]]":
        split = the_shape(self.data.read(), "image/boxes", self.data.word)
        artifact.model.check_split(split)
        artifact.model.places(split)
        examples = list(split.held_out[: self.limit])
        if not any(len(example.boxes) for example in examples):
            raise UserError(f"the held-out part of {self.data.word} has no box to be found")
        return split, examples

    def _measurements(
        self, examples: "Sequence[Example]", detections: "Sequence[Detections]", protocol: str
    ) -> Iterable[Measurement]:
        from llmq.vision.average_precision import AREAS, Match

        values = _torchmetrics(examples, detections)
        for metric, area in METRICS.items():
            matches = [Match.of(e, d, area=AREAS[area]) for e, d in zip(examples, detections, strict=True)]
            if any(len(match.wanted) for match in matches):
                yield self._measurement(metric, values[metric], matches, f"overlap 0.50:0.05:0.95; {protocol}")
            if area == "all":
                for single, (row, name) in SINGLE.items():
                    of_one = [match.at(row) for match in matches]
                    yield self._measurement(single, values[name], of_one, f"overlap 0.{single[3:]}; {protocol}")

    def _measurement(self, metric: str, value: float, matches: "Sequence[Match]", protocol: str) -> Measurement:
        from llmq.vision.average_precision import influences

        groups = min(GROUPS, len(matches))
        samples, stderr = None, None
        each = influences(matches, value, groups) if groups > 1 else None
        if each is not None:
            samples, stderr = Samples(tuple(map(float, each))), float(each.std(ddof=1) / groups**0.5)
            protocol += f"; jackknife over {groups} groups of images: a sample is what one does to the figure"
        return Measurement(self.name, metric, value, "", "higher", len(matches), stderr, protocol, samples)


def _share_of_detections(
    task: Detection, sha256: str, models: Sequence[Loaded[Detector]], share: together.Share
) -> "dict[int, Detections]":
    """The detections in the images in a share of the batches, with the labels of the model."""
    from llmq.vision.family import check_same

    (loaded,) = models
    split, examples = task._examples(loaded.artifact)
    check_same(split, sha256, task.data.word)
    numbers = share.in_batches(len(examples), task.batch_size)
    found = loaded.artifact.model.detect(loaded, [examples[i].image for i in numbers], task.batch_size)
    return dict(zip(numbers, found, strict=True))


def _renumbered(detections: "Detections", numbers: dict[int, int]) -> "Detections":
    """Detections with the labels of the data, without those of other classes."""
    import numpy as np

    kept = np.flatnonzero(np.isin(detections.labels, list(numbers)))
    labels = np.array([numbers[int(label)] for label in detections.labels[kept]], np.int64)
    return replace(detections, boxes=detections.boxes[kept], scores=detections.scores[kept], labels=labels)


def _truth(example: "Example") -> "dict[str, Tensor]":
    """The objects and crowds of an example as torchmetrics takes them."""
    import numpy as np
    import torch

    from llmq.vision.average_precision import Truth

    truth = Truth.of(example)
    # torchmetrics takes an area of 0 for a missing one.
    plain = {"boxes": truth.boxes, "labels": truth.labels, "iscrowd": truth.crowded.astype(np.int64)}
    return {name: torch.from_numpy(each) for name, each in {**plain, "area": np.maximum(truth.areas, 1e-6)}.items()}


def _torchmetrics(examples: "Sequence[Example]", detections: "Sequence[Detections]") -> dict[str, float]:
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    from llmq.vision.average_precision import LEVELS, THRESHOLDS

    # Left to itself torchmetrics counts its thresholds in float32, and a recall of 0.7 is then above "0.7".
    metric = MeanAveragePrecision(
        iou_thresholds=list(THRESHOLDS), rec_thresholds=LEVELS.tolist(), backend="faster_coco_eval"
    )
    metric.warn_on_many_detections = False
    metric.update(
        [{name: torch.from_numpy(value) for name, value in vars(each).items()} for each in detections],
        [_truth(example) for example in examples],
    )
    return {name: float(value) for name, value in metric.compute().items() if value.numel() == 1}


OVER = 0.4
"""The overlap from which two drawn boxes are of one object."""


def picture(shown: "Sequence[tuple[Example, Detections]]", classes: Sequence[str], shown_from: float) -> bytes:
    """Examples as PNG: the truth in green, detections with a score of `shown_from` and more in orange."""
    import numpy as np

    from llmq.vision.average_precision import overlap
    from llmq.vision.pictures import panels, png, show

    rows = -(-len(shown) // COLUMNS)
    figure, axes = panels(rows, min(COLUMNS, len(shown)), 3.2, 3.3)
    for panel, (example, detections) in zip(axes.ravel(), shown, strict=False):
        drawn = detections.scores >= shown_from
        show(panel, example.image, f"{example.name}: {len(example.boxes)} there, {int(drawn.sum())} found")
        for box, label in zip(example.boxes, example.labels, strict=True):
            _draw(panel, box, _name(classes, label), TRUTH, above=True)
        best_first = np.argsort(-detections.scores[drawn], kind="stable")
        columns = (detections.boxes, detections.labels, detections.scores)
        boxes, labels, scores = (column[drawn][best_first] for column in columns)
        for i, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
            # Of boxes over one object only the best carries its text, or nobody could read it.
            covered = i and float(overlap(box[None], boxes[:i]).max()) > OVER
            _draw(panel, box, "" if covered else f"{_name(classes, label)} {score:.2f}", FOUND, above=False)
    return png(figure)


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


LINE = 0.06
"""The height of a line of text, as a share of the height of the picture."""


def _draw(panel: "Axes", box: "ndarray", text: str, colour: str, above: bool) -> None:
    """A box, and its text above or below; inside where the picture ends there."""
    from matplotlib.patches import Rectangle

    # matplotlib centres pixels on whole numbers; the edges of boxes lie between pixels.
    x0, y0, x1, y1 = (float(v) - 0.5 for v in box)
    panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
    if text:
        ground = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 0.6}
        bottom, top = panel.get_ylim()  # rows count downwards
        line = LINE * (bottom - top)
        inside = y0 - line < top if above else y1 + line > bottom
        side = "bottom" if above != inside else "top"
        panel.text(x0, y0 if above else y1, text, color=colour, fontsize=6.5, va=side, clip_on=True, bbox=ground)

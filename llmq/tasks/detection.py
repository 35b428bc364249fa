"""How well objects are found."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.models.vision import the_shape
from llmq.plugin import DataWord
from llmq.types import Exhibit, Loaded, Measurement, Samples, Split, Task

METRICS = {"map": "all", "map_small": "small", "map_medium": "medium", "map_large": "large"}
SINGLE = {"map50": (0, "map_50"), "map75": (5, "map_75")}
"""Of one threshold: which of the ten, and what torchmetrics calls it."""
GROUPS = 256


class Detection(Task):
    """COCO's mean average precision: over overlaps of 0.50 to 0.95, at 0.50, at 0.75, and of small to large objects.

    Computed by torchmetrics over faster-coco-eval. Where labels of the model have names that the data knows, they are
    matched by name, else by number. The standard error is a jackknife over images, and its influence values let two
    stages be compared in pairs.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"detector"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})

    data: DataWord = Field(
        "scenes",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    limit: PositiveInt | None = Field(None, description="held-out images at most")
    batch_size: PositiveInt = 16
    examples: int = Field(6, ge=0, description="images shown with what was found")
    shown_from: float = Field(0.4, ge=0, le=1, description="score from which a detection is drawn")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for data without boxes, or with other classes than the network's."""
        self._examples(base)

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """Detect in every held-out image, measure, and show some."""
        split, examples = self._examples(loaded.artifact)
        model: Any = loaded.artifact.model
        places = model.places(split)
        found = model.detect(loaded, [example.image for example in examples], self.batch_size)
        if places is not None:
            found = [_renumbered(one, {place: number for number, place in enumerate(places)}) for one in found]
        how = "classes by number" if places is None else "classes by name"
        yield from self._measurements(examples, found, self._protocol(split, model, how))
        if self.examples:
            from llmq.tasks.detection_picture import picture

            shown = list(zip(examples, found, strict=True))[: self.examples]
            yield Exhibit(
                self.name,
                "Detections",
                input=f"{len(shown)} of {len(examples)} held-out images",
                output=f"orange: found, score of {self.shown_from:g} and more",
                reference="green: the truth",
                picture=picture(shown, split.classes, self.shown_from),
            )

    def _examples(self, artifact: Artifact) -> tuple[Split, list[Any]]:
        split = the_shape(self.data.read(), "image/boxes", self.data.word)
        model: Any = artifact.model
        model.check_split(split)
        examples = list(split.held_out[: self.limit])
        if not any(len(example.boxes) for example in examples):
            raise UserError(f"the held-out part of {self.data.word} has no box to be found")
        return split, examples

    def _protocol(self, split: Split, model: Any, how: str) -> str:
        return (
            "COCO: 101 levels of recall, 100 detections of a class an image, classes of equal weight; crowds ignored, "
            "annotated areas, small below 32^2 pixels, large above 96^2; "
            f"scores from {model.score_threshold:g}; {how}; {self.data.word} held_out, sha256 "
            f"{split.sha256[:12]}"
        )

    def _measurements(self, examples: Sequence[Any], found: Sequence[Any], protocol: str) -> Iterable[Measurement]:
        from llmq.tasks.average_precision import AREAS, Match

        values = _torchmetrics(examples, found)
        for metric, area in METRICS.items():
            matches = [Match.in_example(e, f, area=AREAS[area]) for e, f in zip(examples, found, strict=True)]
            if any(len(match.wanted) for match in matches):
                yield self._measurement(metric, values[metric], matches, f"overlap 0.50:0.05:0.95; {protocol}")
            if area == "all":
                for single, (row, name) in SINGLE.items():
                    of_one = [match.at(row) for match in matches]
                    yield self._measurement(single, values[name], of_one, f"overlap 0.{single[3:]}; {protocol}")

    def _measurement(self, metric: str, value: float, matches: Sequence[Any], protocol: str) -> Measurement:
        from llmq.tasks.average_precision import influences

        groups = min(GROUPS, len(matches))
        samples, stderr = None, None
        each = influences(matches, value, groups) if groups > 1 else None
        if each is not None:
            samples, stderr = Samples(tuple(map(float, each))), float(each.std(ddof=1) / groups**0.5)
            protocol += f"; jackknife over {groups} groups of images: a sample is what one does to the figure"
        return Measurement(self.name, metric, value, "", "higher", len(matches), stderr, protocol, samples)


def _renumbered(found: Any, numbers: dict[int, int]) -> Any:
    """Detections with the labels of the data, without those of other classes."""
    import numpy as np

    kept = np.flatnonzero(np.isin(found.labels, list(numbers)))
    labels = np.array([numbers[int(label)] for label in found.labels[kept]], np.int64)
    return type(found)(found.boxes[kept], found.scores[kept], labels)


def _truth(example: Any) -> dict[str, Any]:
    """The objects and crowds of an example, with their areas, as torchmetrics takes them."""
    import numpy as np
    import torch

    from llmq.tasks.average_precision import sizes_of

    areas = sizes_of(example.boxes) if example.areas is None else example.areas
    boxes, labels = example.boxes, example.labels
    crowded: Any = np.zeros(len(boxes), np.int64)
    if example.crowds is not None:
        boxes, labels = np.concatenate([boxes, example.crowds]), np.concatenate([labels, example.crowd_labels])
        areas = np.concatenate([areas, sizes_of(example.crowds)])
        crowded = np.concatenate([crowded, np.ones(len(example.crowds), np.int64)])
    # An area of 0 would be taken for one that nobody has said.
    plain = {"boxes": boxes, "labels": labels, "iscrowd": crowded, "area": np.maximum(areas, 1e-6)}
    return {name: torch.from_numpy(np.asarray(its)) for name, its in plain.items()}


def _torchmetrics(examples: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    from llmq.tasks.average_precision import LEVELS, THRESHOLDS

    # Left to itself torchmetrics counts its thresholds in float32, and a recall of 0.7 is then above "0.7".
    metric = MeanAveragePrecision(
        iou_thresholds=list(THRESHOLDS), rec_thresholds=LEVELS.tolist(), backend="faster_coco_eval"
    )
    metric.warn_on_many_detections = False
    metric.update(
        [{k: torch.from_numpy(getattr(f, k)) for k in ("boxes", "scores", "labels")} for f in found],
        [_truth(example) for example in examples],
    )
    return {name: float(value) for name, value in metric.compute().items() if value.numel() == 1}

"""The base of the families of detectors: boxes beside images, raw heads as a graph, detections in float32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import LlmqError, UserError
from llmq.types import Loaded, Split
from llmq.vision.family import Batch, ImageModel, Learner, Training, as_tuple, in_batches, noise
from llmq.vision.images import Example, numbers_of, relabelled

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.predictors import Predictor

    Images = Sequence[ndarray]
    Sizes = Sequence[tuple[int, int]]  # rows and columns
    Targets = Sequence[Mapping[str, Tensor]]  # boxes and labels of an image
    Fitted = tuple[Tensor, Sizes, Targets | None]
    Criterion = Callable[[Tensor, Targets], Tensor]


@dataclass(frozen=True)
class Detections:
    """The objects of one image, best first. A box is x0, y0, x1, y1 in pixels of the original image."""

    boxes: "ndarray"  # (n, 4)
    scores: "ndarray"  # (n,)
    labels: "ndarray"  # (n,)


class Detector(ImageModel):
    """A family of detectors. It defines `side`, `class_count`, `fit`, `decode` and `criterion` as well.

    The network maps a float tensor of one fixed size to raw head tensors. Boxes, scores and the
    selection are computed from these outside the network: the same float32 arithmetic follows a quantized graph.
    """

    kind: ClassVar[str] = "detector"
    suite: ClassVar[str] = "detector"
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})
    training: ClassVar[Training] = Training(16, 1e-3, "detection loss", weight_decay=1e-4)

    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are not reported")
    max_detections: PositiveInt = Field(100, description="in one image")

    @property
    def side(self) -> int:
        """The side of the square input, in pixels."""
        raise NotImplementedError

    def class_count(self) -> int:
        """The number of labels that the network tells apart."""
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """The names of the labels; empty if the weights name none."""
        return ()

    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.class_names())

    def fit(self, images: "Images", targets: "Targets | None" = None) -> "Fitted":
        """Scale uint8 images `(h, w, 3)` to the square input.

        Returns the input, the rows and columns that each image fills in the input, and the targets in input pixels.
        """
        raise NotImplementedError

    def decode(self, raw: "tuple[Tensor, ...]", fitted: "Sizes", sizes: "Sizes") -> list[Detections]:
        """The detections in pixels of the original images, whose sizes are `sizes`, and `fitted` within the input."""
        raise NotImplementedError

    def criterion(self, network: "Module") -> "Criterion":
        """The loss of `network` as a function of images and targets."""
        raise NotImplementedError

    def prepare(self, images: "Images") -> "Tensor":
        return self.fit(images)[0]

    def example(self, batch_size: int) -> "Tensor":
        return noise(batch_size, 3, self.side, self.side)

    def detect(self, loaded: Loaded, images: "Images", batch_size: int = 16) -> list[Detections]:
        """The detections of an open model in uint8 images `(height, width, 3)` of any size."""
        import torch

        detections: list[Detections] = []
        with torch.inference_mode():
            for some in in_batches(images, batch_size):
                inputs, fitted, _ = self.fit(some)  # inputs (n, 3, side, side)
                raw = tuple(t.float().cpu() for t in as_tuple(loaded.module(inputs.to(loaded.device))))
                if not all(bool(t.isfinite().all()) for t in raw):  # such scores would pass for an empty image
                    raise LlmqError(f"{self.word}: the network answers with numbers that are not finite")
                detections += self.decode(raw, fitted, [image.shape[:2] for image in some])
        return detections

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        if len(split.classes) > self.class_count():
            raise UserError(
                f"{self.word}: the data has {len(split.classes)} classes, and this network has {self.class_count()}"
            )
        self.places(split)

    def places(self, split: Split) -> list[int] | None:
        """The label that stands for each class of the data, by name; None where the weights name no class of the data.

        Raises `UserError` where the weights name only some of the classes.
        """
        return numbers_of(split.classes, self.names())

    def outputs_of(self, split: Split) -> Mapping[int, str]:
        return {} if self.places(split) else dict(enumerate(split.classes))

    def numbered(self, split: Split) -> Split:
        return relabelled(split, self.places(split) or range(len(split.classes)))

    def not_watchable(self, examples: Sequence[Example]) -> str:
        has_boxes = any(len(example.boxes) for example in examples)  # without one there is no precision
        return "" if has_boxes else f"the first {len(examples)} held-out examples have no box"

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.detecting import Detecting

        return Detecting

    def learners(self, network: "Module") -> list[Learner]:
        criterion = self.criterion(network)
        return [Learner("loss", network, lambda batch: criterion(batch["images"], batch["targets"]))]

    def batch(self, examples: Sequence[Example], rng: "Generator", augment: str, crop: int | None) -> Batch:
        import torch

        if crop is not None:
            raise UserError(f"crop {crop}: a detector learns from whole images; leave it out")
        seen = [moved(example.image, example.boxes, rng, augment) for example in examples]
        targets = [
            {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(example.labels)}
            for (_, boxes), example in zip(seen, examples, strict=True)
        ]
        inputs, _, fitted = self.fit([image for image, _ in seen], targets)
        return {"images": inputs, "targets": fitted}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """COCO's average precision at the threshold 0.5 of overlap."""
        from llmq.vision.average_precision import Match, mean_average_precision

        detections = self.detect(loaded, [example.image for example in examples])
        matches = [Match.of(e, d, (0.5,)) for e, d in zip(examples, detections, strict=True)]
        return "map50", mean_average_precision(matches)


def moved(image: "ndarray", boxes: "ndarray", rng: "Generator", augment: str) -> "tuple[ndarray, ndarray]":
    """An image and its boxes, mirrored by chance (`flip`), or turned by quarters as well (`dihedral`)."""
    import numpy as np

    if augment == "none":
        return image, boxes
    height, width = image.shape[:2]
    if augment == "dihedral" and rng.integers(2):  # rows become columns; with the mirrors below, all eight
        image, boxes = image.transpose(1, 0, 2), boxes[:, [1, 0, 3, 2]]
        height, width = width, height
    if rng.integers(2):
        image = image[:, ::-1]  # x0 and x1 change places
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if augment == "dihedral" and rng.integers(2):
        image = image[::-1]  # y0 and y1 change places
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1)
    return image, boxes

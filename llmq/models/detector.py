"""What detectors share: boxes beside images, the raw heads as a graph, and detections made of them in float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.data.images import Example, numbers_of, relabelled
from llmq.errors import LlmqError, UserError
from llmq.models.vision import Learning, Player, Vision, in_batches, the_shape
from llmq.types import Loaded, Split


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first: numpy `boxes` `(n, 4)`, `scores` and `labels` `(n,)`.

    A box is x0, y0, x1, y1 in pixels of the image as it was given.
    """

    boxes: Any
    scores: Any
    labels: Any


class Detector(Vision):
    """A family of detectors. It says its `fit`, `decode` and `loss` beside what every image model says.

    The module maps a float tensor of one fixed size to raw head tensors; boxes, scores and their selection are made of
    these outside of it, so that an exported and quantized graph is followed by the same float arithmetic.
    """

    kind: ClassVar[str] = "detector"
    suite: ClassVar[str] = "detector"
    learning: ClassVar[Learning] = Learning(1e-3, 16, "detection loss", weight_decay=1e-4)

    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are not reported")
    max_detections: PositiveInt = Field(100, description="in one image")

    def fit(self, images: Sequence[Any], targets: Sequence[dict[str, Any]] | None = None) -> Any:
        """Images uint8 `(h, w, 3)` in the network's input: `(tensor, sizes, targets)`.

        `sizes` says how many of its rows and columns each image takes; targets come back in its pixels.
        """
        raise NotImplementedError

    def decode(self, raw: tuple[Any, ...], fitted: Sequence[Any], sizes: Sequence[Any]) -> list[Detections]:
        """Detections in pixels of images of `sizes` `(height, width)`, which were fitted to `fitted`."""
        raise NotImplementedError

    def criterion(self, network: Any) -> Any:
        """What maps `(images, targets)` to the loss of `network`, a tensor."""
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """What its labels stand for, where its weights tell; empty if only the data does."""
        return ()

    def class_count(self) -> int:
        """How many labels it tells apart."""
        raise NotImplementedError

    def prepare(self, images: Sequence[Any]) -> Any:
        """Images uint8 `(height, width, 3)` as the float input."""
        return self.fit(images)[0]

    def detect(self, loaded: Loaded, images: Sequence[Any], batch_size: int = 16) -> list[Detections]:
        """What the opened model finds in images uint8 `(height, width, 3)` of any size."""
        import torch

        found: list[Detections] = []
        with torch.inference_mode():
            for some in in_batches(images, batch_size):
                inputs, fitted, _ = self.fit(some)
                raw = loaded.module(inputs.to(loaded.device))
                raw = [t.float().cpu() for t in (raw if isinstance(raw, list | tuple) else (raw,))]
                if not all(bool(t.isfinite().all()) for t in raw):  # they would pass for nothing found
                    word = type(self).__module__.removeprefix("llmq.")
                    raise LlmqError(f"{word}: the network answers with numbers that are not finite")
                found += self.decode(tuple(raw), fitted, [image.shape[:2] for image in some])
        return found

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for data without boxes, or with more classes than this network tells apart."""
        word = type(self).__module__.removeprefix("llmq.")
        the_shape(split, "image/boxes", word)
        if len(split.classes) > self.class_count():
            raise UserError(
                f"{word}: the data has {len(split.classes)} classes, and this network has {self.class_count()}"
            )
        self.places(split)

    def places(self, split: Split) -> list[int] | None:
        """The label that stands for each class of the data by its name; None where its weights name none of them.

        Raises `UserError` where they name some and not others.
        """
        return numbers_of(split.classes, [(name,) for name in self.class_names()])

    def outputs_of(self, split: Split) -> Mapping[int, str]:
        """The class of each output, where classes are told by their numbers."""
        return (
            {}
            if numbers_of(split.classes, [(name,) for name in self.class_names()])
            else dict(enumerate(split.classes))
        )

    def numbered(self, split: Split) -> Split:
        """The split with its labels as this network numbers them."""
        return relabelled(split, self.places(split) or range(len(split.classes)))

    def batch(self, examples: Sequence[Example], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """Images, and a list of targets with `boxes` and `labels` in the pixels of the input."""
        import torch

        if crop is not None:
            raise UserError(f"crop {crop}: a detector learns from whole images; leave it out")
        seen = [moved(example.image, example.boxes, rng, augment) for example in examples]
        targets = [
            {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(example.labels)}
            for (_, boxes), example in zip(seen, examples, strict=True)
        ]
        inputs, _, targets = self.fit([image for image, _ in seen], targets)
        return {"images": inputs, "targets": targets}

    def players(self, network: Any) -> list[Player]:
        """One: the network, which lowers the sum of its family's own losses."""
        return [Player("loss", network, partial(_loss, self.criterion(network)))]

    def not_watchable(self, examples: Sequence[Example]) -> str:
        """Boxes are needed, or there is no precision."""
        has_boxes = any(len(example.boxes) for example in examples)
        return "" if has_boxes else f"the first {len(examples)} held-out examples have no box"

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """COCO's average precision at an overlap of one half."""
        from llmq.tasks.average_precision import Match, mean_average_precision

        found = self.detect(loaded, [example.image for example in examples])
        matches = [Match.in_example(e, d, (0.5,)) for e, d in zip(examples, found, strict=True)]
        return "map50", mean_average_precision(matches)


def _loss(criterion: Any, batch: Mapping[str, Any]) -> Any:
    return criterion(batch["images"], batch["targets"])


def moved(image: Any, boxes: Any, rng: Any, augment: str) -> tuple[Any, Any]:
    """An image and its boxes, mirrored by chance (`flip`), or turned by quarters as well (`dihedral`)."""
    import numpy as np

    if augment == "none":
        return image, boxes
    height, width = image.shape[:2]
    if augment == "dihedral" and rng.integers(2):  # rows become columns; with the mirrors below, all eight
        image, boxes = image.transpose(1, 0, 2), boxes[:, [1, 0, 3, 2]]
        height, width = width, height
    if rng.integers(2):
        image = image[:, ::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if augment == "dihedral" and rng.integers(2):
        image = image[::-1]
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1)
    return image, boxes

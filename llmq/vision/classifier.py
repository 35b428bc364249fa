"""The base of the families of image classifiers: cross-entropy, mirrored images, top-1."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from llmq.errors import UserError
from llmq.types import Loaded, Split
from llmq.vision.family import Batch, ImageModel, Learner, Training, in_batches, varied
from llmq.vision.images import Example, numbers_of, relabelled

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.predictors import Predictor

BATCH = 4  # images at a time, for inference: 32 take eight times the memory, and no less time


class Classifier(ImageModel):
    """A network that maps an image to one logit for each class. A family defines `outputs`."""

    kind: ClassVar[str] = "classifier"
    suite: ClassVar[str] = "classifier"
    shapes: ClassVar[frozenset[str]] = frozenset({"image", "image/label"})
    training: ClassVar[Training] = Training(64, 2e-3, "nats an image", weight_decay=0.05)

    @property
    def outputs(self) -> int:
        """The number of logits."""
        raise NotImplementedError

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        if split.shape == "image/label" and len(split.classes) != self.outputs:
            raise UserError(
                f"the data has {len(split.classes)} classes, and this network has {self.outputs}; "
                f"set model.classes={len(split.classes)} (and model.new_head=true where it keeps its weights)"
            )

    def places(self, split: Split) -> list[int]:
        """The output that stands for each class of the data, by name, or by number where no name is known.

        Raises `UserError` if only some names are known, or if none is known and the data has another number of classes.
        """
        self.check_images(split)
        numbers = numbers_of(split.classes, self.names())
        if numbers is None and split.classes and len(split.classes) != self.outputs:
            raise UserError(
                f"the data has {len(split.classes)} classes, and this network has {self.outputs}, "
                f"none of them named {split.classes[0]!r}; name data of its classes, or images without (labels: false)"
            )
        return list(range(self.outputs)) if numbers is None else numbers

    def not_watchable(self, examples: Sequence[Example]) -> str:
        lacks = any(example.label is None for example in examples)
        return f"the first {len(examples)} held-out examples have no labels" if lacks else ""

    def outputs_of(self, split: Split) -> Mapping[int, str]:
        return {} if numbers_of(split.classes, self.names()) else dict(enumerate(split.classes))

    def numbered(self, split: Split) -> Split:
        return relabelled(split, self.places(split))  # labels become numbers of outputs

    def logits(self, loaded: Loaded, images: "Sequence[ndarray]") -> "Tensor":
        """The logits of images, float32 `(n, classes)` in main memory."""
        import torch

        with torch.inference_mode():
            parts = [loaded.module(self.prepare(part).to(loaded.device)) for part in in_batches(images, BATCH)]
            return torch.cat([part.float().cpu() for part in parts])  # (n, classes)

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.classifying import Classifying

        return Classifying

    def learners(self, network: "Module") -> list[Learner]:
        from torch.nn.functional import cross_entropy

        def loss(batch: Batch) -> "Tensor":
            return cross_entropy(network(batch["images"]).float(), batch["labels"])  # (n, classes), (n,)

        return [Learner("cross-entropy", network, loss)]

    def batch(self, examples: Sequence[Example], rng: "Generator", augment: str, crop: int | None) -> Batch:
        import torch

        images = [image for example in examples for image in varied([example.image], rng, augment, crop)]
        return {"images": self.prepare(images), "labels": torch.tensor([_label(example) for example in examples])}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The top-1 accuracy: the share of examples whose largest logit is that of the label."""
        answers = self.logits(loaded, [example.image for example in examples]).argmax(1).tolist()
        right = sum(answer == _label(example) for answer, example in zip(answers, examples, strict=True))
        return "top1", right / len(examples)


def _label(example: Example) -> int:
    if example.label is None:
        raise UserError(f"{example.name!r} has no label to learn from; name data with labels")
    return example.label


def as_timm_evaluates(
    images: "Sequence[ndarray]",
    channels: int,
    sides: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    **scaling: object,
) -> "Tensor":
    """Images on [0, 1], normalized, after timm's scaling and cut of uint8 images of any size.

    `scaling` is timm's `interpolation`, `crop_pct` and `crop_mode`. `(n, channels, *sides)`
    """
    import torch
    from PIL import Image
    from timm.data import create_transform

    transform = create_transform((channels, *sides), mean=tuple(mean), std=tuple(std), **scaling)
    pixels = (with_channels(image, channels) for image in images)
    return torch.stack([transform(Image.fromarray(p[..., 0] if channels == 1 else p)) for p in pixels])


def with_channels(image: "ndarray", channels: int) -> "ndarray":
    """A uint8 image with 1 or 3 channels: grey is repeated, colour becomes luma (ITU-R 601)."""
    import numpy as np

    if image.shape[2] == channels:
        return image
    if channels == 3:
        grey: ndarray = np.repeat(image, 3, axis=2)  # (height, width, 3)
        return grey
    # (height, width, 3) @ (3,), and one channel: (height, width, 1)
    luma: ndarray = np.round(image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return luma


def with_new_head(state: "Mapping[str, Tensor]", network: "Module", classes: int) -> "dict[str, Tensor]":
    """Replace the classification head in `state` by zeros of the shapes in `network`.

    The head is every tensor that differs in the number of rows alone, of which the network has one for each class.
    Fine-tuning begins with a head of zeros in Kolesnikov et al. 2020; zeros need no seed. Raises `UserError` if `state`
    has no such tensor.
    """
    import torch

    own = network.state_dict()
    fresh = {
        name: torch.zeros_like(own[name])
        for name, tensor in state.items()
        if name in own
        and own[name].shape != tensor.shape
        and own[name].shape[1:] == tensor.shape[1:]
        and len(own[name]) == classes  # one row for each class
    }
    if not fresh:
        raise UserError(f"new_head: the weights have {classes} classes already, or another architecture; leave it out")
    return {**state, **fresh}

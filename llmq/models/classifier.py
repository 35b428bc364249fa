"""What the families of image classifiers share: cross-entropy, mirrored images, top-1."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llmq.data.images import Example, numbers_of, relabelled
from llmq.errors import UserError
from llmq.models.vision import Learning, Player, Vision, in_batches
from llmq.types import Loaded, Split

BATCH = 32


class Classifier(Vision):
    """A family whose network maps images to one logit a class. A family says how many `classes` there are."""

    kind: ClassVar[str] = "classifier"
    suite: ClassVar[str] = "classifier"
    learning: ClassVar[Learning] = Learning(2e-3, 64, "nats an image", weight_decay=0.05)

    @property
    def outputs(self) -> int:
        """How many logits the network has."""
        raise NotImplementedError

    def names(self) -> tuple[tuple[str, ...], ...]:
        """For each output what it may be called, the plainest name last; empty if nobody has said."""
        return ()

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for examples that are no images, or that have other classes than the network."""
        _the_shape(split)
        if split.shape == "image/label" and len(split.classes) != self.outputs:
            raise UserError(
                f"the data has {len(split.classes)} classes, and this network has {self.outputs}; "
                f"set model.classes={len(split.classes)} (and model.new_head=true where it keeps its weights)"
            )

    def check_images(self, split: Split) -> None:
        """Raise `UserError` for examples that are no images; calibration looks at no label."""
        _the_shape(split)

    def places(self, split: Split) -> list[int]:
        """The output that stands for each class of the data: by its name, or, where none is known, the same number.

        Raises `UserError` if some are known by name and some not, or none and there are not as many as outputs.
        """
        _the_shape(split)
        found = numbers_of(split.classes, self.names())
        if found is None and split.classes and len(split.classes) != self.outputs:
            raise UserError(
                f"the data has {len(split.classes)} classes, and this network has {self.outputs}, "
                f"none of them named {split.classes[0]!r}; name data of its classes, or images without (labels: false)"
            )
        return list(range(self.outputs)) if found is None else found

    def outputs_of(self, split: Split) -> Mapping[int, str]:
        """The class of each output, where classes are told by their numbers."""
        return {} if numbers_of(split.classes, self.names()) else dict(enumerate(split.classes))

    def numbered(self, split: Split) -> Split:
        """The split with its labels as this network numbers them."""
        return relabelled(split, self.places(split))

    def logits(self, loaded: Loaded, images: Sequence[Any]) -> Any:
        """What the network answers to images, float32 `(n, classes)` in main memory."""
        import torch

        with torch.inference_mode():
            parts = [loaded.module(self.prepare(part).to(loaded.device)) for part in in_batches(images, BATCH)]
            return torch.cat([part.float().cpu() for part in parts])

    def players(self, network: Any) -> list[Player]:
        """The network, learning by cross-entropy."""
        from torch.nn.functional import cross_entropy

        def loss(batch: Mapping[str, Any]) -> Any:
            return cross_entropy(network(batch["images"]).float(), batch["labels"])

        return [Player("cross-entropy", network, loss)]

    def batch(self, examples: Sequence[Example], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """Images as the network takes them, after crop and turn, and their labels."""
        import torch

        images = [varied(example.image, rng, augment, crop) for example in examples]
        return {"images": self.prepare(images), "labels": torch.tensor([_label(example) for example in examples])}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The share of examples whose largest logit is their label's."""
        answers = self.logits(loaded, [example.image for example in examples]).argmax(1).tolist()
        right = sum(answer == _label(example) for answer, example in zip(answers, examples, strict=True))
        return "top1", right / len(examples)


def _the_shape(split: Split) -> None:
    if split.shape not in ("image", "image/label"):
        raise UserError(f"a classifier needs examples image/label or image, and these are {split.shape}")


def _label(example: Example) -> int:
    if example.label is None:
        raise UserError(f"{example.name!r} has no label to learn from; name data with labels")
    return example.label


def varied(image: Any, rng: Any, augment: str, crop: int | None) -> Any:
    """A random square of `crop` pixels out of an image, mirrored (`flip`), or turned as well (`dihedral`)."""
    import numpy as np

    if crop:
        side = min(crop, *image.shape[:2])
        top, left = (int(rng.integers(0, length - side + 1)) for length in image.shape[:2])
        image = image[top : top + side, left : left + side]
    if augment != "none" and rng.random() < 0.5:
        image = image[:, ::-1]
    if augment == "dihedral":
        image = np.rot90(image, int(rng.integers(4)))
    return np.ascontiguousarray(image)


def with_channels(image: Any, channels: int) -> Any:
    """An image uint8 with 1 or 3 channels: grey repeated, or colour as its luma (ITU-R 601)."""
    import numpy as np

    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.round(image.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]


def with_new_head(state: Mapping[str, Any], network: Any, classes: int) -> dict[str, Any]:
    """Given tensors, those that are one row a class replaced by zeros in the shape that `network` has for them.

    A head of zeros is where fine-tuning begins in Kolesnikov et al. 2020, and needs no seed. Raises `UserError` if
    there is nothing to replace.
    """
    import torch

    own = network.state_dict()
    fresh = {
        name: torch.zeros_like(own[name])
        for name, tensor in state.items()
        if name in own
        and own[name].shape != tensor.shape
        and own[name].shape[1:] == tensor.shape[1:]
        and len(own[name]) == classes
    }
    if not fresh:
        raise UserError(f"new_head: the weights have {classes} classes already, or another architecture; leave it out")
    return {**state, **fresh}

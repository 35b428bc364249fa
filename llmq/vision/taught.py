"""The settings that trainings with a teacher share, and what is checked before them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Context, Split, Step
from llmq.vision.family import ImageModel, Training, fewer_at_once

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work

WARMUP = 0.05  # share of the steps
DISTANCES: Mapping[str, Literal["kl", "l1", "l2"]] = {"classifier": "kl", "detector": "l2"}
"""The distance of the outputs by kind where no step says another; l1 for other kinds."""
UNITS = {"kl": "nats an image from the teacher", "l1": "L1 from the teacher", "l2": "L2 from the teacher"}


OF_IMAGES = ("data", "augment", "crop", "held_out_examples")
"""Settings that latents have no use for."""


class Taught(Step[ImageModel]):
    writes: ClassVar[float] = 4.0  # the network, and in a checkpoint the network with two moments
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "training"
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    data: DataWord | None = Field(None, description="its training images are shown; a gan needs none, it draws latents")
    max_steps: PositiveInt = 500
    batch_size: PositiveInt | None = Field(None, description="images a step; the family's own, or 64 latents, if unset")
    learning_rate: PositiveFloat | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    loss: Literal["kl", "l1", "l2"] | None = Field(
        None,
        description="distance of the outputs; kl for a classifier, l2 for a detector, l1 for other kinds if unset; "
        "of several outputs each is measured by the teacher's standard deviation",
    )
    temperature: PositiveFloat = Field(1.0, description="of the two distributions that kl compares")
    features: tuple[str, ...] = Field(
        (), description="layers whose maps of attention are compared as well, by their names in both networks"
    )
    feature_weight: PositiveFloat = Field(1.0, description="of their distance in the loss")
    augment: Literal["none", "flip", "dihedral"] | None = Field(None, description="mirrored, or turned as well")
    crop: PositiveInt | None = Field(None, description="pixels of a random square; the family's own if unset")
    channels_last: bool = Field(True, description="memory order of images and weights")
    held_out_examples: int = Field(32, ge=0, description="for the held-out figure while training; 0: none")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")

    def check(self) -> None:
        super().check()
        if self.feature_weight != 1.0 and not self.features:
            raise UserError("feature_weight is read for features alone; name layers there, or leave it out")

    def distance_of(self, kind: str) -> Literal["kl", "l1", "l2"]:
        """The distance of the outputs for a kind of models."""
        return self.loss or DISTANCES.get(kind, "l1")

    def settings(self, artifact: Artifact[ImageModel], context: Context, own: Training) -> Training:
        """The settings of the training, those of this step over `own`."""
        return own.set_by(self, artifact, context).lasting(self.max_steps, WARMUP)

    def check_taught(self, base: Artifact[ImageModel], label_weight: float = 0.0) -> None:
        """Raise `UserError` for data that this network cannot be shown, and for a distance that does not suit it."""
        from llmq.vision.teaching import unlabelled

        model = base.model
        if self.distance_of(model.kind) == "kl" and model.kind != "classifier":
            raise UserError(f"loss: kl compares the classes of a classifier, and this is a {model.kind}; take l1 or l2")
        if model.two_stages:
            raise UserError(
                f"{model.title} answers with the objects that it finds, and those of two networks are no pairs; take a "
                "detector of one stage, such as fcos"
            )
        if self.temperature != 1.0 and self.distance_of(model.kind) != "kl":
            raise UserError(
                f"temperature is read by kl alone, and outputs are compared by {self.distance_of(model.kind)}"
            )
        if model.kind == "gan":
            told = (name for name in OF_IMAGES if getattr(self, name) != type(self).model_fields[name].default)
            if odd := next(told, None):
                raise UserError(f"a gan is taught on latents that it draws; leave {odd!r} out")
            return
        if self.data is None:
            raise UserError("it needs 'data' to be shown to both networks, such as what the network was trained on")
        shown = list if label_weight else unlabelled
        model.check_training(self.data, self.crop, self.held_out_examples, shown)

    def examples(self, model: ImageModel) -> tuple[Split | None, Sequence[Any], Sequence[Any]]:
        """The data, what is shown, and what is watched; a gan has no data, and latents by number alone."""
        if self.data is None:
            from llmq.vision.teaching import WATCHED

            return None, range(self.batch_size or 64), range(WATCHED)
        split = model.numbered(self.data.read())
        return split, split.train, split.held_out[: self.held_out_examples]

    def work(self, before: "Sketch", own: Training) -> "Work":
        """A training beside the teacher."""
        from dataclasses import replace

        from llmq.vision.sizing import as_images, forward, opening, training, working

        sketch = as_images(before)
        settings = own.overridden(self)
        assert sketch.model
        crop = self.crop or sketch.model.cropped
        taught = forward(sketch, settings.batch_size * self.max_steps, settings.batch_size)
        work = training(sketch, settings, crop).plus(replace(taught, memory=0)).plus(opening(sketch))
        # The teacher is open beside, and its answers to the batch are there with those of the network.
        return replace(work, memory=work.memory + working(sketch, settings.batch_size))

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """Fewer examples at once."""
        return fewer_at_once(self.batch_size or 0)

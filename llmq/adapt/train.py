"""Trains all weights of an image model on data; the family defines the loss and the defaults.

Cross-entropy for a classifier, the detector's losses, L1 for super-resolution, two networks in turn for a GAN.
Batches, crops and augmentation depend on the seed and the number of the step alone, so a training that is
killed and resumed ends with the same weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Context, Step
from llmq.vision.family import IMAGE_MODELS, ImageModel, fewer_at_once

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class Train(Step[ImageModel]):
    suits = IMAGE_MODELS
    writes: ClassVar[float] = 4.0  # the network, and in a checkpoint the network with two moments
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "training"
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    data: DataWord
    max_steps: PositiveInt | None = Field(None, description="instead of num_train_epochs")
    num_train_epochs: PositiveFloat = 1.0
    batch_size: PositiveInt | None = Field(None, description="examples a step")
    learning_rate: PositiveFloat | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    optim: Literal["adam", "adamw", "sgd"] | None = Field(None, description="sgd has a momentum of 0.9")
    weight_decay: float | None = Field(None, ge=0)
    max_grad_norm: PositiveFloat | None = Field(None, description="no clipping if unset")
    augment: Literal["none", "flip", "dihedral"] | None = Field(None, description="mirrored, or turned as well")
    crop: PositiveInt | None = Field(None, description="pixels of a random square; the family's own if unset")
    autocast: bool | None = Field(
        None,
        description="products in bfloat16, weights in float32; if unset, the family's own where the hardware has it",
    )
    channels_last: bool | None = Field(None, description="memory order of images and weights")
    keep_sparsity: bool | None = Field(
        None, description="weights that are zero stay zero; if unset, where prune.magnitude came before"
    )
    eval_steps: PositiveInt | None = Field(None, description="steps between held-out figures; a quarter if unset")
    held_out_examples: int = Field(32, ge=0, description="for the held-out figure while training; 0: none")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same tensors, trained; weights, gradients, the optimizer's numbers and activations are there at once."""
        from dataclasses import replace

        from llmq.vision.sizing import as_images, forward, opening, training

        sketch = as_images(before)
        assert sketch.model
        settings = sketch.model.training.overridden(self)
        expected = self.data.expected()
        rows = self.num_train_epochs * expected.train / settings.batch_size if expected else 0
        steps = self.max_steps or max(0, round(rows))
        crop = self.crop or sketch.model.cropped
        watched = min(self.held_out_examples, expected.held_out if expected else self.held_out_examples)
        watching = replace(forward(sketch, 4 * watched), memory=0)  # unless `eval_steps` says otherwise
        work = training(sketch, replace(settings, max_steps=steps), crop).plus(watching).plus(opening(sketch))
        return before, work if steps else replace(work, unknown="the steps of an epoch are known when data is read")

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """Fewer examples at once."""
        return fewer_at_once(self.batch_size or 0)

    def check(self) -> None:
        super().check()
        if self.max_steps and "num_train_epochs" in self.model_fields_set:
            raise UserError(
                f"num_train_epochs {self.num_train_epochs:g} has no effect with max_steps {self.max_steps}; keep one"
            )

    def check_base(self, base: Artifact[ImageModel]) -> None:
        """Raise `UserError` for data that this network cannot learn from."""
        base.model.check_training(self.data, self.crop, self.held_out_examples, lambda examples: examples)

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the network there."""
        from llmq.vision.loop import trained_stage

        model = artifact.model
        split = model.numbered(self.data.read())
        training = model.training.set_by(self, artifact, context)
        steps = self.max_steps or max(1, round(self.num_train_epochs * len(split.train) / training.batch_size))
        notes = {
            "data": {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts}
            | ({"classes": list(split.classes)} if split.classes and not model.names() else {}),
            "training": training.noted(),
        }
        held_out = split.held_out[: self.held_out_examples]
        training = training.lasting(steps, self.warmup_ratio)
        return trained_stage(self, artifact, folder, context, model, split.train, held_out, training, notes)

"""Trains a generator to make of every latent the same image as the untouched base; no data is needed.

Each step draws new latents, so the network can memorise none. A training that is killed
and resumed ends with the same weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Context, Loaded, Step
from llmq.vision.family import Batch, ImageModel, Learner, Training

if TYPE_CHECKING:
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.sketch import Sketch, Work

WATCHED = 64  # latents of the figure while training
WARMUP = 0.05  # share of the steps


class Distill(Step[ImageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"gan"})
    writes: ClassVar[float] = 4.0  # the network, and in a checkpoint the network with two moments
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    max_steps: PositiveInt = 500
    batch_size: PositiveInt = Field(64, description="latents a step")
    learning_rate: PositiveFloat = 2e-3
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    loss: Literal["l1", "l2"] = Field("l1", description="of the numbers on [-1, 1]")
    autocast: bool | None = Field(
        None, description="products in bfloat16, weights in float32; if unset, where the hardware does that"
    )
    channels_last: bool = Field(True, description="memory order of images and weights")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same tensors, trained beside the base that teaches."""
        from dataclasses import fields, replace

        from llmq.vision.sizing import as_images, forward, opening, training, working

        sketch = as_images(before)
        told = {f.name: value for f in fields(Training) if (value := getattr(self, f.name, None)) is not None}
        settings = replace(Training(self.batch_size, self.learning_rate, self.loss, optim="adam"), **told)
        taught = forward(sketch, self.batch_size * self.max_steps, self.batch_size)
        work = training(sketch, settings, None).plus(replace(taught, memory=0)).plus(opening(sketch))
        # The teacher is open beside, and its answers to the batch are there with those of the network.
        return before, replace(work, memory=work.memory + working(sketch, self.batch_size))

    def check_base(self, base: Artifact[ImageModel]) -> None:
        """Raise `UserError` for a base with random weights, which has nothing to teach."""
        if base.model.weights is None:
            raise UserError("the base has random weights, and so nothing to teach; set model.weights")

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the network there."""
        from llmq.vision.loop import trained_stage

        unit = f"{self.loss.upper()} on [-1, 1]"
        training = Training(self.batch_size, self.learning_rate, unit, optim="adam", autocast=True)
        training = training.set_by(self, artifact, context).lasting(self.max_steps, WARMUP)
        noted = {
            "teacher": "0-base",
            "distance": self.loss,
            "loss_unit": unit,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "autocast": training.autocast,
            "seed": training.seed,
        }
        latents = range(self.batch_size), range(WATCHED)
        with artifact.model.base(context).open(context.device) as teacher:
            lessons = Lessons(artifact.model, teacher.module, self.loss)
            return trained_stage(self, artifact, folder, context, lessons, *latents, training, {"training": noted})


@dataclass(frozen=True)
class Lessons:
    """New latents for each step, the distance of a generator from the teacher, and the PSNR between the two."""

    model: Any
    teacher: "Module"
    loss: str

    def learners(self, network: "Module") -> list[Learner]:
        from torch.nn import functional

        distance = {"l1": functional.l1_loss, "l2": functional.mse_loss}[self.loss]

        def away(batch: Batch) -> "Tensor":
            return distance(network(batch["latents"]).float(), self._wanted(batch["latents"]))

        return [Learner("distance", network, away)]

    def batch(self, examples: Sequence[int], rng: "Generator", augment: str, crop: int | None) -> Batch:
        import torch

        latents = rng.standard_normal((len(examples), self.model.latent_size, 1, 1), dtype="float32")
        return {"latents": torch.from_numpy(latents)}

    def validate_on(self, loaded: Loaded, examples: Sequence[int]) -> tuple[str, float]:
        """The mean PSNR in dB against the teacher, on fixed latents that training does not draw."""
        import torch

        latents = self.model.latents(len(examples), 0, "watched").to(loaded.device)
        with torch.no_grad():
            # The values lie in [-1, 1], a data range of 2: the squared peak of the PSNR is 4.
            squared = (loaded.module(latents).float() - self._wanted(latents)).square().mean((1, 2, 3)) / 4  # (n,)
        return "psnr", float(-10 * squared.clamp_min(1e-10).log10().mean())

    def _wanted(self, latents: "Tensor") -> "Tensor":
        import torch

        with torch.no_grad():
            wanted: Tensor = self.teacher(latents).float()
        return wanted

"""Recovery of a compressed generator without data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.models.vision import Player
from llmq.types import Context, Loaded, Step

WATCHED = 64  # latents of the figure while training


class Distill(Step):
    """Trains a generator to make of every latent what the untouched base makes of it; it needs no data.

    Each step draws new latents, so nothing can be learnt by heart. A killed training goes on to the same weights.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"gan"})
    writes: ClassVar[float] = 4.0  # the network, and in a checkpoint the network with two moments
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    max_steps: PositiveInt = 500
    batch_size: PositiveInt = Field(64, description="latents a step")
    learning_rate: PositiveFloat = 2e-3
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    loss: Literal["l1", "l2"] = Field("l1", description="of the numbers on [-1, 1]")
    autocast: bool = Field(True, description="products in bfloat16, weights in float32")
    channels_last: bool = Field(True, description="memory order of images and weights")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for a base that has nothing to teach."""
        if getattr(base.model, "weights", None) is None:
            raise UserError("the base has random weights, and so nothing to teach; set model.weights")

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the network there."""
        from llmq.adapt.loop import Plan, train
        from llmq.adapt.moved import Start
        from llmq.models.reopened import meant, reopened
        from llmq.models.state import save_network

        quarter = max(1, self.max_steps // 4)
        plan = Plan(
            steps=self.max_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=self.lr_scheduler_type,
            warmup=round(0.05 * self.max_steps),
            optim="adam",
            betas=(0.9, 0.999),
            weight_decay=0.0,
            max_grad_norm=None,
            augment="none",
            crop=None,
            autocast=self.autocast,
            channels_last=self.channels_last,
            eval_steps=quarter,
            save_steps=self.save_steps or quarter,
            seed=context.seed if self.seed is None else self.seed,
            keep_zeros="prune.magnitude" in artifact.history,
        )
        base = artifact.model.base(context)
        with base.open(context.device) as teacher, artifact.open(context.device) as pupil:
            lessons: Any = Lessons(artifact.model, teacher, self.loss)
            start = Start(artifact.model, pupil.module)
            taught = replace(pupil, artifact=replace(artifact, model=lessons))
            history = train(taught, range(self.batch_size), range(WATCHED), plan, folder)
            save_network(pupil.module, folder)
            what = meant(artifact.model, pupil.module)
            moved = start.moved(pupil.module, what)
        about = {"teacher": "0-base", "loss": self.loss, "loss_unit": f"{self.loss.upper()} on [-1, 1]"}
        settings = {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "seed": plan.seed}
        made = artifact.then(self, weights=folder, notes={"training": {**history, **about, **settings}, **moved})
        return reopened(what, made, context.device)


@dataclass(frozen=True)
class Lessons:
    """What the training loop asks of a family: latents, how far a generator is from its teacher, and the PSNR."""

    model: Any
    teacher: Loaded
    loss: str

    def players(self, network: Any) -> list[Player]:
        """The generator alone."""
        from torch.nn import functional

        distance = {"l1": functional.l1_loss, "l2": functional.mse_loss}[self.loss]

        def away(batch: Mapping[str, Any]) -> Any:
            return distance(network(batch["latents"]).float(), self._wanted(batch["latents"]))

        return [Player("distance", network, away)]

    def batch(self, examples: Sequence[int], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """New latents, as many as examples."""
        import torch

        latents = rng.standard_normal((len(examples), self.model.latent_size, 1, 1), dtype="float32")
        return {"latents": torch.from_numpy(latents)}

    def validate_on(self, loaded: Loaded, examples: Sequence[int]) -> tuple[str, float]:
        """Mean PSNR against the teacher on latents that are in no lesson, in dB."""
        import torch

        latents = self.model.latents(len(examples), 0, "watched").to(loaded.device)
        with torch.no_grad():
            squared = (loaded.module(latents).float() - self._wanted(latents)).square().mean((1, 2, 3)) / 4
        return "psnr", float(-10 * squared.clamp_min(1e-10).log10().mean())

    def _wanted(self, latents: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.teacher.module(latents).float()

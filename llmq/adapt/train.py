"""Training of image models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.models.vision import KINDS
from llmq.plugin import DataWord
from llmq.types import Context, Step


class Train(Step):
    """Trains all weights of an image model on data; the loss is the family's own, and so is what is unset here.

    Cross-entropy for a classifier, the detector's losses, L1 for super-resolution, two networks in turn for a GAN.
    Batches, crops and augmentation depend on the seed and the number of the step alone, so a killed training goes on to
    the same weights.
    """

    suits: ClassVar[frozenset[str]] = KINDS
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
    autocast: bool | None = Field(None, description="products in bfloat16, weights in float32")
    channels_last: bool | None = Field(None, description="memory order of images and weights")
    keep_sparsity: bool | None = Field(
        None, description="weights that are zero stay zero; if unset, where prune.magnitude came before"
    )
    eval_steps: PositiveInt | None = Field(None, description="steps between held-out figures; a quarter if unset")
    held_out_examples: int = Field(32, ge=0, description="for the held-out figure while training; 0: none")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for data that this network cannot learn from."""
        model: Any = base.model
        split = self.data.read()
        model.check_split(split)
        if not len(split.train):
            raise UserError(f"the training part of {self.data.word} is empty; hold less out")
        import numpy as np

        # What the family makes of one example says whether it can learn from it: labels, channels, crop.
        model.batch(model.numbered(split).train[:1], np.random.default_rng(0), "none", self.crop)
        watched = split.held_out[: self.held_out_examples]
        if len(watched) and (lacks := model.not_watchable(watched)):
            raise UserError(f"{lacks} to watch the training; hold more out, or set held_out_examples: 0")

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the network there."""
        from llmq.adapt.loop import Plan, train
        from llmq.adapt.moved import Start
        from llmq.models.reopened import meant, reopened
        from llmq.models.state import save_network

        model: Any = artifact.model
        split = model.numbered(self.data.read())
        learning = {name: self._choice(name, model.learning) for name in CHOICES}
        steps = self.max_steps or max(1, round(self.num_train_epochs * len(split.train) / learning["batch_size"]))
        plan = Plan(
            **learning,
            betas=model.learning.betas,
            steps=steps,
            schedule=self.lr_scheduler_type,
            warmup=round(self.warmup_ratio * steps),
            max_grad_norm=self.max_grad_norm,
            crop=self.crop,
            eval_steps=self.eval_steps or max(1, steps // 4),
            save_steps=self.save_steps or max(1, steps // 4),
            seed=context.seed if self.seed is None else self.seed,
            keep_zeros="prune.magnitude" in artifact.history if self.keep_sparsity is None else self.keep_sparsity,
        )
        with artifact.open(context.device) as loaded:
            start = Start(model, loaded.module)
            history = train(loaded, split.train, split.held_out[: self.held_out_examples], plan, folder)
            save_network(loaded.module, folder)
            what = meant(model, loaded.module)
            moved = start.moved(loaded.module, what)
        notes = {
            "data": {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts},
            "training": {**history, **learning, "seed": plan.seed, "loss_unit": model.learning.loss_unit},
            **moved,
        }
        return reopened(what, artifact.then(self, weights=folder, notes=notes), context.device)

    def _choice(self, name: str, learning: Any) -> Any:
        own = getattr(self, name)
        return getattr(learning, name) if own is None else own


CHOICES = ("batch_size", "learning_rate", "optim", "weight_decay", "augment", "autocast", "channels_last")
"""What a family has a default for."""

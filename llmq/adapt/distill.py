"""Trains an image model to answer as a teacher does: the untouched base, an earlier stage of the run, or any stage.

Logits of a classifier, the heads' outputs of a detector, images of super-resolution and of a generator; feature maps
where `features` names layers. A generator learns from new latents at each step, so it can memorise none; other kinds
are shown `data`. A training that is killed and resumed ends with the same weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Context
from llmq.vision.family import IMAGE_MODELS, ImageModel, Training
from llmq.vision.taught import UNITS, Taught

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class Distill(Taught):
    suits = IMAGE_MODELS

    teacher: str = Field("base", description="base, a stage before in this run (1-adapt.train), or a stage's folder")
    label_weight: float = Field(0.0, ge=0, lt=1, description="share of the loss that is the family's own, of labels")
    autocast: bool | None = Field(
        None, description="products in bfloat16, weights in float32; if unset, where the hardware does that"
    )
    keep_sparsity: bool | None = Field(
        None, description="weights that are zero stay zero; if unset, where prune.magnitude came before"
    )

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same tensors, trained beside the teacher."""
        from llmq.vision.sizing import as_images

        model = as_images(before).model
        assert model
        return before, self.work(before, self._own(model))

    def _own(self, model: ImageModel) -> Training:
        unit = UNITS[self.distance_of(model.kind)]
        if model.kind == "gan":
            return Training(64, 2e-3, f"{unit}, on [-1, 1]", optim="adam", autocast=True)
        return replace(model.training, loss_unit=unit)

    def check_base(self, base: Artifact[ImageModel]) -> None:
        """Raise `UserError` for a base with random weights that is to teach, and for data that does not fit."""
        self.check_taught(base, self.label_weight)
        if self.teacher == "base" and base.model.weights is None:
            raise UserError(
                "the base has random weights, and so nothing to teach; set model.weights, or name a teacher: a stage "
                "of this run, or a folder"
            )
        if self.label_weight and base.model.kind == "gan":
            raise UserError("label_weight: a gan has no labels; leave it out")

    def apply(self, artifact: Artifact[ImageModel], folder: Path, context: Context) -> Artifact:
        """Train from the last checkpoint in `folder` if there is one, and write the network there."""
        from llmq.vision.loop import trained_stage
        from llmq.vision.teaching import FromLatents, Lessons, check_alike, teacher_of

        model = artifact.model
        split, examples, watched = self.examples(model)
        training = self.settings(artifact, context, self._own(model))
        told: dict[str, object] = {
            "teacher": "0-base" if self.teacher == "base" else self.teacher,
            "distance": self.distance_of(model.kind),
            **training.noted(),
        }
        notes: dict[str, object] = {"training": told}
        if split is not None and self.data is not None:
            notes["data"] = {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts}
        teaches = FromLatents if model.kind == "gan" else Lessons
        with teacher_of(self.teacher, artifact, folder, context).open(context.device) as teacher:
            with artifact.open(context.device) as loaded:
                check_alike(teacher, model, loaded.module, examples, split.classes if split else ())
            distance = self.distance_of(model.kind)
            settings = (self.temperature, self.label_weight, self.features, self.feature_weight)
            lessons = teaches(model, teacher.module, distance, *settings)
            return trained_stage(self, artifact, folder, context, lessons, examples, watched, training, notes)

"""Trains the scales of a GPTQ checkpoint against the logits of the untouched base; codes and zero points stay.

The second phase of EfficientQAT (Chen et al. 2024), by the KL divergence of the next tokens. The file grows by nothing,
and opens wherever it opened before. Each scale moves in steps relative to itself, so one learning rate suits all.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq import processes
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.text.calibration import Windowed
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work
    from llmq.text.scales import Student


ANSWER_BYTES = 512
"""The bytes of the teacher's answer to one token: 64 tokens, each with its log probability."""
ROUNDING = 1e-4
"""The greatest distance of two answers in float32, as a share of their norm, where sums are added in another order."""


class Scales(Windowed):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": True, "adapter": False}
    in_every_process: ClassVar[bool] = True

    samples: PositiveInt = Field(64, description="windows to learn from, drawn at random under the seed")
    max_steps: PositiveInt = 60
    learning_rate: PositiveFloat = Field(1e-3, description="relative to each scale")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    per_device_train_batch_size: PositiveInt = Field(1, description="windows")
    temperature: PositiveFloat = Field(1.0, description="of the two distributions that are compared")
    eval_steps: PositiveInt | None = Field(None, description="steps between held-out losses; a quarter of all if unset")
    held_out_rows: int = Field(4, ge=0, description="windows for the held-out loss while training; 0: none")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")

    def check(self) -> None:
        super().check()
        if engine := processes.sharding():
            raise UserError(f"accelerate's {engine} shares weights out; adapt.lora trains so, adapt.scales not")

    def check_base(self, base: Artifact[LanguageModel]) -> None:
        """Raise `UserError` for a base that is packed itself: the float weights are what teaches."""
        if base.packed:
            raise UserError(f"{base.model.weights!r} is packed already, so nothing is left to teach its scales")

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same codes; the float base answers all windows first, then the scales learn from the answers."""
        from llmq.sketch import Work, times
        from llmq.text.sizing import work
        from llmq.text.sizing.network import as_text

        source = as_text(before)
        rows, length = self.per_device_train_batch_size, self.length
        step = work.training_scales(source, rows, length)
        asked = times(work.forward(source, 1, length), self.samples + self.held_out_rows)
        looks = self.max_steps // (self.eval_steps or max(1, self.max_steps // 4)) * self.held_out_rows
        told = ANSWER_BYTES * length * (self.samples + self.held_out_rows)
        done = times(step, self.max_steps).plus(asked).plus(times(work.forward(source, 1, length), looks))
        return source, done.plus(Work(0, {}, 3 * work.PROBES, told))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Train from the last whole checkpoint in `folder` if there is one, and write the stage there."""
        from llmq.reopened import same_answers
        from llmq.text.scales import Student, quantized, write_with
        from llmq.text.training import CHECKPOINTS

        windows, data = self.windows(artifact, context.seed)
        held_out = self.held_out_windows(artifact, self.held_out_rows) if len(windows[0]) == self.length else []
        told = folder / CHECKPOINTS / "teacher.npy"
        with processes.first_does(context.device):
            if not told.exists():
                told.parent.mkdir(parents=True, exist_ok=True)
                self._ask_teacher(artifact, [*windows, *held_out], told, context)
        with artifact.open(context.device) as loaded:
            module = loaded.module
            student = Student(module, quantized(artifact.weights, module), self.temperature)
            history = self._train(student, windows, held_out, folder, context)
            moved = student.moved()
            scales = student.scales()
            if processes.is_first():
                write_with(scales, artifact.weights, module, folder)
            answers = artifact.model.probe(module)
            del module, student  # or the trained model would stay beside the reopened one
        notes = {"calibration": data, "training": {**history, "seed": context.seed, "teacher": "0-base"}, **moved}
        tuned = artifact.then(self, weights=folder, notes=notes)
        if not processes.is_first():
            return tuned
        shutil.rmtree(folder / CHECKPOINTS)
        # In the form that was trained: packed layers add in another order, and the fewer bits, the farther apart.
        return same_answers(
            answers, tuned, context.device, lambda opened: Student(opened, quantized(folder, opened)), ROUNDING
        )

    def _ask_teacher(self, artifact: Artifact, windows: list[list[int]], file: Path, context: Context) -> None:
        from llmq.text.scales import answers

        with artifact.model.base(context).open(context.device) as teacher:
            answers(teacher.module, windows, self.temperature, file)

    def _train(
        self, student: "Student", windows: list[list[int]], held_out: list[list[int]], folder: Path, context: Context
    ) -> dict[str, object]:
        from transformers import set_seed

        from llmq.text.scales import Lessons, ScaleTrainer
        from llmq.text.training import CHECKPOINTS, schedule, trained

        set_seed(context.seed)
        rows = range(len(windows))
        watched = range(len(windows), len(windows) + len(held_out))
        lessons = Lessons([*windows, *held_out], folder / CHECKPOINTS / "teacher.npy")
        arguments = {
            **self.model_dump(include={"learning_rate", "lr_scheduler_type", "per_device_train_batch_size"}),
            **schedule(self.max_steps, self.warmup_ratio, self.eval_steps, self.save_steps),
            "per_device_eval_batch_size": self.per_device_train_batch_size,
            "eval_strategy": "steps" if held_out else "no",
            "weight_decay": 0.0,
            "seed": context.seed,
            "use_cpu": context.device == "cpu",
            "dataloader_pin_memory": context.device != "cpu",
        }
        return trained(
            ScaleTrainer,
            folder,
            arguments,
            asked={},
            model=student,
            train_dataset=rows,
            eval_dataset=watched or None,
            data_collator=lessons,
        )[1]

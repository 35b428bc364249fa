"""Mean KL divergence to the base and top-1 agreement on held-out text; answers to questions that flipped.

Two models of one accuracy may answer different questions right: flips count the changed answers, in both directions
(Dutta et al. 2024, Accuracy is Not All You Need). The questions are those of multiple-choice tasks of lm-eval.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import sha256_files
from llmq.harness.names import Asked
from llmq.plugin import DataWord
from llmq.types import Answer, Better, Loaded, Measurement, Needs, Task

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work


class Divergence(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    in_every_process: ClassVar[bool] = True

    text: DataWord = Field(
        "pydoc",
        validate_default=True,
        description="its held-out part is read; the run's training data, else its calibration data, if unset",
    )
    window: PositiveInt = Field(256, ge=2, description="tokens")
    windows: PositiveInt = Field(32, description="windows at most")
    tasks: tuple[str, ...] = Field(("pydoc_continuation",), description="multiple-choice tasks of lm-eval; may be none")
    num_fewshot: int | None = Field(None, ge=0, description="the task's own if unset")
    limit: PositiveInt | None = Field(200, description="questions a task at most")
    include_path: Path | None = Field(None, description="a folder with more task files")
    data_dir: Path | None = Field(None, description="copies of data sets, as of lm_eval")
    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="texts at once; changes no score")

    def check(self) -> None:
        super().check()
        self._asked().check()
        for task in self._asked().leaves():
            kind = task.says.get("output_type")
            if kind not in (None, "multiple_choice"):
                raise UserError(f"tasks: flips are counted on multiple choice, and {task.name!r} is {kind}")

    def depends(self) -> Mapping[str, object]:
        from llmq.harness.data import depends

        return depends(self._asked(), self.limit) if self.tasks else {}

    def _asked(self) -> Asked:
        return Asked(self.tasks, self.include_path, self.data_dir, self.num_fewshot)

    def needs(self) -> Needs:
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.text, "held_out", self.window)

    def foresee(self, stage: "Sketch") -> "Work":
        """Nothing: only beside the base is there a divergence."""
        from llmq.sketch import Work

        return Work()

    def foresee_against(self, stage: "Sketch", base: "Sketch") -> "Work":
        """Passes of the stage and of the base over the same windows, and float64 softmax of both."""
        from dataclasses import replace

        from llmq.sketch import BYTES, times
        from llmq.text.losses import ROWS
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.work import divergence, forward

        model = as_text(stage)
        once = forward(model, 1, self.window)
        work = times(once, 2.0 * self.windows).plus(divergence(model, self.windows * self.window))
        # The base's logits and a copy of each beside the stage's own, and a few tokens of both in float64 with softmax.
        copies = 3 * BYTES[model.dtype] * self.window + 4 * 8 * min(ROWS, self.window)
        return replace(work, memory=once.memory + base.in_memory + copies * model.vocabulary)

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Answer]:
        """The divergence from the base on text, then the flips on each task."""
        sha256 = sha256_files(base.artifact.weight_files())[:12]
        yield from self._on_text(loaded, base, sha256)
        if self.tasks:
            before, after = (list(self._right(model)) for model in (base, loaded))
            for (task, was, asked), (_, now, _) in zip(before, after, strict=True):
                yield from self._flips(task, was, now, asked, sha256)

    def _on_text(self, loaded: Loaded, base: Loaded, sha256: str) -> Iterable[Measurement]:
        from llmq.text.losses import divergence
        from llmq.text.tokenizer import end_marks
        from llmq.text.windows import held_out_windows

        split = self.text.read()
        ends = end_marks(base.artifact.weights)
        windows, told = held_out_windows(split, loaded.processor, self.window, self.windows, ends)
        if not windows:
            raise UserError(f"the held-out part of {self.text.word} has nothing to read")
        protocol = (
            f"KL(base || stage), float64 softmax, {told}; "
            f"{self.text.word} held_out, sha256 {split.sha256[:12]}; base {sha256}"
        )
        tokens = [window.tokens for window in windows]
        return divergence(base.module, loaded.module, tokens, loaded.device, self.name, "kl_to_base", protocol)

    def _right(self, model: Loaded) -> Iterator[tuple[str, dict[str, float], int]]:
        """(task, 1 or 0 for each question with a score: right or wrong by the plain `acc`, number of questions)."""
        from llmq.harness.results import answers, identity
        from llmq.harness.run import evaluated

        size = None if self.batch_size == "auto" else self.batch_size
        evaluation = evaluated(model, self._asked(), size, limit=self.limit)
        evaluation.end()
        for task in evaluation.results["samples"]:
            asked = answers(evaluation.results, task)
            right = {identity(s): float(s["acc"]) for s in asked if s.get("acc") is not None}
            if not right:
                raise UserError(f"tasks: flips are counted on right and wrong answers, and {task!r} has no 'acc'")
            yield task, right, len({identity(s) for s in asked})

    def _flips(
        self, task: str, before: Mapping[str, float], after: Mapping[str, float], asked: int, base: str
    ) -> Iterator[Measurement]:
        from llmq.statistics.figures import mean

        ids = tuple(i for i in before if i in after)  # a task may leave a question unscored for one of the models
        pairs = [(before[i], after[i]) for i in ids]
        if not pairs:
            raise UserError(f"tasks: no question of {task!r} was scored for both models")
        lost = tuple(float(b >= 0.5 > a) for b, a in pairs)
        gained = tuple(float(a >= 0.5 > b) for b, a in pairs)
        both = tuple(x + y for x, y in zip(lost, gained, strict=True))
        left = f", {asked - len(ids)} of {asked} questions left unscored" if len(ids) < asked else ""
        how = f"the first {asked} questions of {task}, by acc; base {base}{left}"
        figures: tuple[tuple[str, tuple[float, ...], Better, str], ...] = (
            ("flips", both, "lower", "answers right in one model and wrong in the other"),
            ("flips_to_wrong", lost, "lower", "right in the base and wrong in the stage"),
            ("flips_to_right", gained, "higher", "wrong in the base and right in the stage"),
        )
        suffix = f" {task}" if len(self.tasks) > 1 or task not in self.tasks else ""  # a group stands for several tasks
        for metric, values, better, meaning in figures:
            yield mean(self.name, metric + suffix, values, "share", better, f"{meaning}; {how}", ids)

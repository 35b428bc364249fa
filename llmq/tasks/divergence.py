"""How far a model has moved from the base, where accuracy may not show it yet."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import sha256_files
from llmq.needs import Needs
from llmq.plugin import DataWord
from llmq.tasks.harness import Asked
from llmq.types import Answer, Loaded, Measurement, Samples, Task


class Divergence(Task):
    """Mean KL divergence to the base and top-1 agreement on held-out text; answers to questions that flipped.

    Two models of one accuracy may answer different questions right: flips count what changed, in both directions
    (Dutta et al. 2024, Accuracy is Not All You Need). The questions are those of multiple-choice tasks of lm-eval.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    text: DataWord = Field(
        "pydoc",
        validate_default=True,
        description="its held-out part is read; what the run trains on, else calibrates on, if unset",
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
        """Raise `UserError` for data that cannot be had, and for tasks that are unknown or offer no choice."""
        super().check()
        from llmq.tasks import harness

        harness.check_names(self.tasks, self.include_path)
        harness.check_leaves(self.tasks, self.include_path, self.num_fewshot)
        for task in harness.leaves(self.tasks, self.include_path):
            kind = task.says.get("output_type")
            if kind not in (None, "multiple_choice"):
                raise UserError(f"tasks: flips are counted on multiple choice, and {task.name!r} is {kind}")

    def depends(self) -> Mapping[str, Any]:
        """Hashes of every task's settings and data."""
        from llmq.tasks.harness_data import depends

        return depends(self._asked(), self.limit) if self.tasks else {}

    def _asked(self) -> Asked:
        return Asked(self.tasks, self.include_path, self.data_dir, self.num_fewshot)

    def needs(self) -> Needs:
        """Positions for a window."""
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for text with nothing to read."""
        from llmq.tasks.windows import check_rows

        check_rows(base, self.text, "held_out", self.window)

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Answer]:
        """Divergence from the base on text, then the flips on each task."""
        its_hash = sha256_files(base.artifact.weight_files())[:12]
        yield from self._on_text(loaded, base, its_hash)
        if self.tasks:
            before, after = (list(self._right(model)) for model in (base, loaded))
            for (task, was, asked), (_, now, _) in zip(before, after, strict=True):
                yield from self._flips(task, was, now, asked, its_hash)

    def _on_text(self, loaded: Loaded, base: Loaded, its_hash: str) -> Iterable[Measurement]:
        from llmq.tasks.kl import apart, figures
        from llmq.tasks.windows import held_out_windows

        split = self.text.read()
        windows, told = held_out_windows(split, loaded.processor, self.window, self.windows)
        if not windows:
            raise UserError(f"the held-out part of {self.text.word} has nothing to read")
        found = apart(base.module, loaded.module, windows, loaded.device)
        protocol = (
            f"KL(base || stage), float64 softmax, {told}; "
            f"{self.text.word} held_out, sha256 {split.sha256[:12]}; base {its_hash}"
        )
        return figures(found, self.name, "kl_to_base", protocol)

    def _right(self, model: Loaded) -> Iterator[tuple[str, dict[str, float], int]]:
        """For each task whether each scored question was answered right, by the plain `acc`, and how many it has."""
        from llmq.tasks.harness_results import answers, identity
        from llmq.tasks.harness_run import evaluated

        size = None if self.batch_size == "auto" else self.batch_size
        found = evaluated(model, self._asked(), size, limit=self.limit)
        found.end()
        for task in found.results["samples"]:
            asked = answers(found.results, task)
            right = {identity(s): float(s["acc"]) for s in asked if s.get("acc") is not None}
            if not right:
                raise UserError(f"tasks: flips are counted on right and wrong answers, and {task!r} has no 'acc'")
            yield task, right, len({identity(s) for s in asked})

    def _flips(
        self, task: str, before: Mapping[str, float], after: Mapping[str, float], asked: int, base: str
    ) -> Iterator[Measurement]:
        ids = tuple(i for i in before if i in after)  # a task may leave a question unscored for one of the models
        pairs = [(before[i], after[i]) for i in ids]
        if not pairs:
            raise UserError(f"tasks: no question of {task!r} was scored for both models")
        lost = tuple(float(b >= 0.5 > a) for b, a in pairs)
        gained = tuple(float(a >= 0.5 > b) for b, a in pairs)
        both = tuple(x + y for x, y in zip(lost, gained, strict=True))
        left = f", {asked - len(ids)} of {asked} questions left unscored" if len(ids) < asked else ""
        how = f"the first {asked} questions of {task}, by acc; base {base}{left}"
        for metric, values, better, what in (
            ("flips", both, "lower", "answers right in one model and wrong in the other"),
            ("flips_to_wrong", lost, "lower", "right in the base and wrong in the stage"),
            ("flips_to_right", gained, "higher", "wrong in the base and right in the stage"),
        ):
            yield self._share(task, metric, Samples(values, ids=ids), better, f"{what}; {how}")

    def _share(self, task: str, metric: str, samples: Samples, better: Any, protocol: str) -> Measurement:
        from llmq.statistics import ratio_stderr

        mean, stderr = ratio_stderr(samples.values)
        named = f"{metric} {task}" if len(self.tasks) > 1 or task not in self.tasks else metric
        n = len(samples.values)
        return Measurement(self.name, named, mean, "share", better, n, stderr, protocol, samples)

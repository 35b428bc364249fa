"""Time of one unit of work, and peak memory. All stages take turns.

Of a language model: time to first token, prefill and greedy decode rate. Of an image model: latency of a batch at
the median and the 95 % quantile, and images a second.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.measure import SETTLE
from llmq.plugin import KindsOf
from llmq.types import Clock, Loaded, Measurement, Model, Needs, Samples, Task, Workload

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work

LOOKING = 0.7
"""Seconds that it takes to close a stage, to see what memory the process has without it, and to open it again."""
UNTIMED = 4
"""The times that a unit of work is done besides the rounds: twice to warm up, twice for the memory."""


class Speed(Task):
    suits = KindsOf(Model)

    prompt_tokens: PositiveInt = Field(128, description="of a language model's prompt")
    new_tokens: PositiveInt = Field(16, description="that a language model writes after it")
    batch_size: PositiveInt = Field(1, description="images that an image model is given at once")
    rounds: PositiveInt = 12

    def check_base(self, base: Artifact) -> None:
        if base.model.kind == "causal-lm":
            self.refuse_unread(("batch_size",), "on a language model, which is given one text at a time")
        else:
            self.refuse_unread(("prompt_tokens", "new_tokens"), f"on a {base.model.kind}")

    def needs(self) -> Needs:
        return Needs("prompt_tokens + new_tokens", self.prompt_tokens + self.new_tokens)

    def foresee(self, stage: "Sketch") -> "Work":
        """The units of work of each round, and those before that nobody times."""
        from llmq.sketch import Work, times

        done = self.rounds + UNTIMED
        unit = stage.timed(self.prompt_tokens, self.new_tokens, self.batch_size)
        return times(unit, done).plus(Work(0, {}, LOOKING + SETTLE * done))

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Peak memory with this stage alone open: above the process without a model, and of the whole process."""
        from llmq.measure import memory_now, peak_memory

        self._work(loaded)  # so that every library is loaded, and its memory is not taken for the model's
        with loaded.artifact.closed(loaded):
            without = memory_now(loaded.device)
        with peak_memory(loaded.device) as peak:
            work = self._work(loaded)
        for metric, value, convention in (
            ("peak_memory", float(max(0, peak.bytes - without)), peak.alone),
            ("peak_memory_of_process", float(peak.bytes), peak.convention),
        ):
            told = f"{convention}; this stage alone open; {work}"
            yield Measurement(self.name, metric, value, "bytes", "lower", 1, None, told, Samples((value,)))

    def _work(self, loaded: Loaded) -> str:
        """Do each unit of work once; the convention of the last."""
        convention = ""
        for clock in self.clocks(loaded):
            clock.run()
            convention = clock.convention
        return convention

    def clocks(self, loaded: Loaded) -> Iterable[Clock]:
        return loaded.artifact.model.clocks(loaded, Workload(task=self.name, **self.model_dump()))

"""How fast a model answers."""

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field, PositiveInt

from llmq.needs import Needs
from llmq.types import Clock, Loaded, Measurement, Samples, Task


class Speed(Task):
    """Time of one unit of work, and peak memory. All stages take turns.

    Of a language model: time to first token, prefill and greedy decode rate. Of an image model: latency of a batch at
    the median and the 95 % quantile, and images a second.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm", "classifier", "detector", "gan", "super-resolution"})

    prompt_tokens: PositiveInt = Field(128, description="of a language model's prompt")
    new_tokens: PositiveInt = Field(16, description="that a language model writes after it")
    batch_size: PositiveInt = Field(1, description="images that an image model is given at once")
    rounds: PositiveInt = 12

    def needs(self) -> Needs:
        """Positions for a prompt and what is written after it."""
        return Needs("prompt_tokens + new_tokens", self.prompt_tokens + self.new_tokens)

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Peak memory with this stage alone open."""
        from llmq.measure import peak_memory

        with peak_memory(loaded.device) as peak:
            clocks = list(self.clocks(loaded))
            for clock in clocks:
                clock.run()
        convention = f"{peak['convention']}; this stage alone open; {clocks[-1].convention}"
        value = float(peak["bytes"])
        return [Measurement(self.name, "peak_memory", value, "bytes", "lower", 1, None, convention, Samples((value,)))]

    def clocks(self, loaded: Loaded) -> Iterable[Clock]:
        """What the model's family gives to be timed."""
        return loaded.artifact.model.clocks(loaded, self)

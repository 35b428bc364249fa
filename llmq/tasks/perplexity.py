"""How surprised a model is by text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import sha256_text
from llmq.needs import Needs
from llmq.plugin import DataWord
from llmq.types import Loaded, Measurement, Samples, Task


class Perplexity(Task):
    """Perplexity a token, a word and a byte, on text in windows, or on completions after their prompts.

    `exp(total loss / count)`, the loss in nats from float32 logits. Texts are joined and cut into windows; of data with
    prompts only what the model should say is scored, one example at a time.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    data: DataWord = Field(
        "pydoc",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    part: Literal["held_out", "all"] = "held_out"
    window: PositiveInt = Field(512, ge=2, description="tokens")
    stride: PositiveInt | None = Field(None, description="tokens from one window to the next; the window if unset")
    bos: bool | None = Field(
        None, description="begin each window with the beginning-of-text mark; as the tokenizer if unset"
    )
    limit: PositiveInt | None = Field(None, description="windows or examples at most")
    batch_size: PositiveInt = 4

    def check(self) -> None:
        """Raise `UserError` for data that cannot be had, or a stride that would leave tokens out."""
        super().check()
        if self.stride and self.stride > self.window:
            raise UserError(f"stride {self.stride} is longer than the window {self.window}; tokens would be left out")

    def depends(self) -> Mapping[str, Any]:
        """Nothing besides."""
        return {}

    def needs(self) -> Needs:
        """Positions for a window."""
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for data with nothing to score."""
        from llmq.tasks.windows import check_rows

        check_rows(base, self.data, self.part, self.window)

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """Loss of every window or example, and the three perplexities that follow."""
        from llmq.tasks.windows import losses

        split = self.data.read()
        rows = split.held_out if self.part == "held_out" else [*split.train, *split.held_out]
        windows, protocol = self._text(rows, loaded) if split.shape == "text" else self._completions(rows, loaded)
        if not windows:
            raise UserError(f"the {self.part.replace('_', '-')} part of {self.data.word} has nothing to score")
        sums = losses(loaded.module, [w.tokens for w in windows], loaded.device, self.batch_size)
        ids = sha256_text(*(" ".join(map(str, w.tokens.ids)) for w in windows))  # tokenizers cut otherwise
        protocol += f"; {self.data.word} {self.part}, sha256 {split.sha256[:12]}, tokens {ids[:12]}"
        if split.unused:
            protocol += f"; columns not used: {', '.join(split.unused)}"
        counts = {
            "token": [w.scored for w in windows],
            "word": [w.words for w in windows],
            "byte": [w.bytes for w in windows],
        }
        vocabulary = float(loaded.module.config.get_text_config().vocab_size)
        found = [self._measurement(unit, sums, n, protocol) for unit, n in counts.items()]
        return [replace(m, chance=vocabulary) if m.metric == "token_perplexity" else m for m in found]

    def _text(self, rows: Sequence[Any], loaded: Loaded) -> tuple[list[Any], str]:
        from llmq.data.tokens import beginning
        from llmq.tasks.windows import joined, windows_of

        bos = bool(beginning(loaded.processor)) if self.bos is None else self.bos
        windows = windows_of(joined(rows), loaded.processor, self.window, self.limit, self.stride, bos)
        overlap = f"a window every {self.stride} tokens" if self.stride and self.stride < self.window else "no overlap"
        mark = "BOS first" if bos else "no BOS, the first token of the text or of a window without overlap not scored"
        first = f", the first {self.limit} windows" if self.limit and len(windows) == self.limit else ""
        return windows, f"texts joined, {self.window}-token windows from the left{first}, {overlap}, {mark}"

    def _completions(self, rows: Sequence[Any], loaded: Loaded) -> tuple[list[Any], str]:
        from llmq.models.hugging_face import end_marks
        from llmq.tasks.windows import completions

        ends = end_marks(loaded.artifact.weights)
        windows, counts = completions(rows[: self.limit], loaded.processor, self.window, ends)
        lost = f"{counts['truncated']} lost their end, {counts['prompt_too_long']} left out"
        return (
            windows,
            f"completions after their prompts with the end-of-text mark, at most {self.window} tokens ({lost})",
        )

    def _measurement(self, unit: str, sums: Sequence[float], counts: Sequence[int], protocol: str) -> Measurement:
        from llmq.estimates import figure
        from llmq.statistics import ratio_stderr

        samples = Samples(tuple(sums), tuple(float(c) for c in counts), "exp")
        value = float(figure(samples)[0])
        stderr = ratio_stderr(sums, samples.weights)[1]
        return Measurement(
            self.name,
            f"{unit}_perplexity",
            value,
            f"per {unit}",
            "lower",
            len(sums),
            None if stderr is None else value * stderr,
            protocol,
            samples,
        )

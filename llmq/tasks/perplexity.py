"""Perplexity a token, a word and a byte, on text in windows, or on completions after their prompts.

`exp(total loss / count)`, the loss in nats from float32 logits. Texts are joined and cut into windows; of data with
prompts only completions and turns of the assistant are scored, one example at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import sha256_text
from llmq.plugin import DataWord
from llmq.types import Loaded, Measurement, Needs, Task

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work
    from llmq.text.rows import Row
    from llmq.text.windows import Window


class Perplexity(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = Field(
        "pydoc",
        validate_default=True,
        description="the run's training data, else its calibration data, if unset; without either, this",
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
        super().check()
        if self.stride and self.stride > self.window:
            raise UserError(f"stride {self.stride} is longer than the window {self.window}; tokens would be left out")

    def depends(self) -> Mapping[str, object]:
        return {}

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over windows, with all logits, and those of a few tokens in float32 with their softmax."""
        from dataclasses import replace

        from llmq.sketch import BYTES, Work, times
        from llmq.text.losses import ROWS
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.work import forward

        known = self.data.expected()
        expected = known.windows(self.part, self.window, self.stride or self.window) if known else None
        windows = min(filter(None, (self.limit, expected)), default=0)
        rows = min(self.batch_size, windows or self.batch_size)
        model = as_text(stage)
        once = forward(model, rows, self.window)
        # The activations are gone before the softmax of a few tokens, which are two in float32, and their logits.
        copies = BYTES[model.dtype] * rows * self.window + 2 * BYTES["float32"] * min(ROWS, self.window)
        memory = max(once.memory, model.in_memory + model.mapped + copies * model.vocabulary)
        passes = replace(times(once, windows / rows), memory=memory)
        unknown = "" if windows else f"{self.data.word} is not read before the run; set limit"
        return passes.plus(Work(0, {"copy": 12.0 * windows * self.window * model.vocabulary}, 1.0, unknown=unknown))

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """Fewer windows at once, then shorter ones."""
        from llmq.sketch import changes

        fewer = [{"batch_size": n} for n in (2, 1) if n < self.batch_size]
        return changes(*fewer, *({"window": n} for n in (256, 128) if n < self.window))

    def needs(self) -> Needs:
        return Needs("window", self.window)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.data, self.part, self.window)
        if self.data.read().shape != "text":
            self.refuse_unread(("stride", "bos"), "on data with prompts, whose completions are scored one by one")

    def score(self, loaded: Loaded) -> Iterable[Measurement]:
        """The three perplexities, from the loss of every window or example."""
        from llmq.statistics.figures import repeats
        from llmq.text.losses import losses

        split = self.data.read()
        rows = split.held_out if self.part == "held_out" else [*split.train, *split.held_out]
        windows, protocol = self._text(rows, loaded) if split.shape == "text" else self._completions(rows, loaded)
        if not windows:
            raise UserError(f"the {self.part.replace('_', '-')} part of {self.data.word} has nothing to score")
        # Nats of each window, added up.
        sums = losses(loaded.module, [w.tokens for w in windows], loaded.device, self.batch_size)
        ids = sha256_text(*(" ".join(map(str, w.tokens.ids)) for w in windows))  # another tokenizer makes other tokens
        protocol += f"; {self.data.word} {self.part}, sha256 {split.sha256[:12]}, tokens {ids[:12]}"
        if split.unused:
            protocol += f"; columns not used: {', '.join(split.unused)}"
        counts = {
            "token": [w.scored for w in windows],
            "word": [w.words for w in windows],
            "byte": [w.bytes for w in windows],
        }
        # A blind guess among all tokens has the size of the vocabulary as its perplexity.
        vocabulary = float(loaded.module.config.get_text_config().vocab_size)
        clusters = None if split.shape == "text" else repeats([w.tokens.prompt for w in windows])
        measured = [self._measurement(unit, sums, n, protocol, clusters) for unit, n in counts.items()]
        return [replace(m, chance=vocabulary) if m.metric == "token_perplexity" else m for m in measured]

    def _text(self, rows: "Sequence[Row]", loaded: Loaded) -> "tuple[list[Window], str]":
        from llmq.text.tokenizer import beginning
        from llmq.text.windows import joined, windows_of

        bos = bool(beginning(loaded.processor)) if self.bos is None else self.bos
        windows = windows_of(joined(rows), loaded.processor, self.window, self.limit, self.stride, bos)
        overlap = f"a window every {self.stride} tokens" if self.stride and self.stride < self.window else "no overlap"
        mark = "BOS first" if bos else "no BOS, the first token of the text or of a window without overlap not scored"
        first = f", the first {self.limit} windows" if self.limit and len(windows) == self.limit else ""
        return windows, f"texts joined, {self.window}-token windows from the left{first}, {overlap}, {mark}"

    def _completions(self, rows: "Sequence[Row]", loaded: Loaded) -> "tuple[list[Window], str]":
        from llmq.text.tokenizer import end_marks
        from llmq.text.windows import completions

        ends = end_marks(loaded.artifact.weights)
        windows, counts = completions(rows[: self.limit], loaded.processor, self.window, ends)
        lost = f"{counts['truncated']} lost their end, {counts['prompt_too_long']} left out"
        different = len({w.tokens.prompt for w in windows})
        lost += f", to {different} different prompts" if different < len(windows) else ""
        told = f"completions after their prompts with the end-of-text mark, at most {self.window} tokens ({lost})"
        return windows, told

    def _measurement(
        self,
        unit: str,
        sums: Sequence[float],
        counts: Sequence[int],
        protocol: str,
        clusters: tuple[int, ...] | None,
    ) -> Measurement:
        from llmq.statistics.figures import ratio

        named = self.name, f"{unit}_perplexity"
        return ratio(*named, sums, counts, f"per {unit}", "lower", protocol, exponential=True, clusters=clusters)

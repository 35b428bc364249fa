"""The settings of a step that needs calibration, and the calibration data in windows of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.sketch import changes
from llmq.text.family import LanguageModel
from llmq.types import Needs, Split, Step

if TYPE_CHECKING:
    from llmq.sketch import Sketch, Work
    from llmq.text.rows import Row


class Windowed(Step[LanguageModel]):
    data: DataWord = Field("pydoc", validate_default=True, description="calibration text; its training part is used")
    samples: PositiveInt = Field(128, description="calibration windows, drawn at random under the seed")
    length: PositiveInt = Field(512, description="tokens in a window")

    def needs(self) -> Needs:
        """The model must have positions for a window."""
        return Needs("length", self.length)

    @property
    def calibration_windows(self) -> tuple[int, int]:
        return self.samples, self.length

    def smaller(self) -> Iterator[Mapping[str, object]]:
        """Half of the windows, and half of that."""
        return changes(*({"samples": self.samples // n} for n in (2, 4, 8, 16) if self.samples >= n))

    def windows(self, artifact: Artifact, seed: int) -> tuple[list[list[int]], dict[str, object]]:
        """`samples` windows of `length` tokens that do not overlap, or as many as there are, and notes on the data.

        A text shorter than a window is one short window. Raises `UserError` for data without a token.
        """
        from llmq.text.tokenizer import load_tokenizer
        from llmq.text.tokens import unused

        split = self.data.read()
        ids, mark = self._ids(artifact, split, split.train), self._mark(artifact, split)
        if not ids:
            raise UserError(f"the calibration data {self.data.word} has no token to calibrate on")
        body = self.length - len(mark)
        starts = range(0, max(1, len(ids) - body + 1), body)  # whole windows only, or one shorter window
        drawn = sorted(random.Random(seed).sample(starts, min(self.samples, len(starts))))  # in the order of the text
        windows = [[*mark, *ids[start : start + body]] for start in drawn]  # (windows, length)
        return windows, {
            "data": {"word": self.data.word, "shape": split.shape, "sha256": split.sha256}
            | unused(split, load_tokenizer(artifact.weights)),
            "samples": len(windows),
            "tokens": sum(map(len, windows)),
        }

    def held_out_windows(self, artifact: Artifact, count: int) -> list[list[int]]:
        """The first `count` whole windows of the held-out part, or as many as there are."""
        split = self.data.read()
        ids, mark = self._ids(artifact, split, split.held_out), self._mark(artifact, split)
        body = self.length - len(mark)
        starts = range(0, len(ids) - body + 1, body)
        return [[*mark, *ids[start : start + body]] for start in starts[:count]]

    def _mark(self, artifact: Artifact, split: Split) -> list[int]:
        """The mark before every window of a text: a model that learned with it (Gemma) sees nonsense without.

        Rows have marks of their own.
        """
        from llmq.text.tokenizer import beginning, load_tokenizer

        if split.shape != "text" or self.length < 2:
            return []
        return beginning(load_tokenizer(artifact.weights))

    def _ids(self, artifact: Artifact, split: Split, rows: Sequence[Row]) -> list[int]:
        """The tokens of some rows of the data: of one text without the mark before it, or of one row after another."""
        from llmq.text.tokenizer import beginning, end_marks, load_tokenizer
        from llmq.text.tokens import Encoder
        from llmq.text.windows import joined

        tokenizer = load_tokenizer(artifact.weights)
        if split.shape == "text":
            ids: list[int] = tokenizer(joined(rows), add_special_tokens=False)["input_ids"]
            mark = beginning(tokenizer)
            return ids[len(mark) :] if ids[: len(mark)] == mark else ids
        encoder = Encoder(tokenizer, end_marks(artifact.weights))
        return [token for row in rows for token in encoder.encode(row).ids]  # one stream, row after row


class Calibrated(Windowed):
    in_every_process: ClassVar[bool] = True
    is_led: ClassVar[bool] = True

    hessian: Literal["inputs", "loss"] = Field("inputs", description="loss: a token counts by the gradient of the loss")
    true_sequential: bool = Field(True, description="a layer sees what became of those before it in its own block")

    @property
    def by_loss(self) -> bool:
        """True if tokens weigh by the gradient of the loss."""
        return self.hessian == "loss"

    def weighed(self, before: Sketch, foreseen: tuple[Sketch, Work]) -> tuple[Sketch, Work]:
        """What is `foreseen` of a step, with the gradients of the loss where tokens weigh by them."""
        if not self.by_loss:
            return foreseen
        from llmq.text.blockwise import BATCH_TOKENS
        from llmq.text.sizing.network import as_text
        from llmq.text.sizing.work import loss_gradients

        made, work = foreseen
        return made, work.plus(loss_gradients(as_text(before), *self.calibration_windows, BATCH_TOKENS))

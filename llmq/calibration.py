"""What a step that looks at activations looks at: the calibration data, and the sums it keeps of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.needs import Needs
from llmq.plugin import DataWord

TILE = 192
"""Columns of a Gram matrix made at a time, or an eighth of all; only tiles up to the diagonal are made."""
TOGETHER = 1024
"""Rows multiplied at a time: fewer read and write the sum more often than they work on it."""


class Calibrated(BaseModel):
    """The settings of a step that looks at activations."""

    data: DataWord = Field("pydoc", validate_default=True, description="calibration text; its training part is used")
    samples: PositiveInt = Field(128, description="calibration windows, drawn at random under the seed")
    length: PositiveInt = Field(512, description="tokens in a window")
    true_sequential: bool = Field(True, description="a layer sees what became of those before it in its own block")

    def needs(self) -> Needs:
        """Positions for a window."""
        return Needs("length", self.length)

    def windows(self, artifact: Artifact, seed: int) -> tuple[list[list[int]], dict[str, Any]]:
        """Token windows that do not overlap, and notes on them. Raises `UserError` if there is not one token."""
        from llmq.data.tokens import Encoder, unused
        from llmq.models.hugging_face import end_marks, load_tokenizer
        from llmq.tasks.windows import joined

        tokenizer = load_tokenizer(artifact.weights)
        split = self.data.read()
        if split.shape == "text":
            ids = tokenizer(joined(split.train), add_special_tokens=False)["input_ids"]
        else:
            encoder = Encoder(tokenizer, end_marks(artifact.weights))
            ids = [token for row in split.train for token in encoder.encode(row).ids]
        if not ids:
            raise UserError(f"the calibration data {self.data.word} has no token to calibrate on")
        starts = range(0, max(1, len(ids) - self.length + 1), self.length)
        drawn = sorted(random.Random(seed).sample(starts, min(self.samples, len(starts))))
        windows = [ids[start : start + self.length] for start in drawn]
        return windows, {
            "data": {"word": self.data.word, "shape": split.shape, "sha256": split.sha256} | unused(split, tokenizer),
            "samples": len(windows),
            "tokens": sum(map(len, windows)),
        }


class Gathered:
    """Sums over the inputs of a layer: their Gram matrix `X^T X`, or only its diagonal (`squares`)."""

    def __init__(self, what: Literal["hessian", "squares"]):
        self.what = what
        self._sum: Any = None
        self._rows: Any = None  # in float32, those beyond `_count` yet to come
        self._count = 0
        self._dtype: Any = None

    def add(self, inputs: Any) -> None:
        """Add activations `[..., features]`, in float32 exact as far as their products are."""
        import torch

        flat = inputs.reshape(-1, inputs.shape[-1])
        if self._sum is None:
            width = flat.shape[1]
            shape = (width, width) if self.what == "hessian" else (width,)
            self._sum = torch.zeros(shape, dtype=torch.float32, device=flat.device)
            self._dtype = flat.dtype
        if self.what == "squares":
            self._sum += flat.float().square().sum(0)
            return
        if self._rows is None:
            self._rows = self._sum.new_empty(TOGETHER, len(self._sum))
        for piece in flat.split(TOGETHER):
            if self._count + len(piece) > TOGETHER:
                self._multiply()
            self._rows[self._count : self._count + len(piece)] = piece
            self._count += len(piece)

    def total(self) -> Any:
        """The sum: `[features, features]`, or its diagonal `[features]`."""
        if self.what == "hessian":
            self._multiply()
            self._rows = None
            for tile in self._tiles():
                self._sum[: tile.start, tile] = self._sum[tile, : tile.start].t()
        return self._sum

    def _multiply(self) -> None:
        values = self._rows[: self._count]
        with products_of_bfloat16(self._dtype):
            for tile in self._tiles():
                self._sum[tile, : tile.stop].addmm_(values[:, tile].t(), values[:, : tile.stop])
        self._count = 0

    def _tiles(self) -> Iterator[slice]:
        width = len(self._sum)
        size = max(TILE, width // 8)
        return (slice(start, min(start + size, width)) for start in range(0, width, size))


@contextmanager
def products_of_bfloat16(dtype: Any) -> Iterator[None]:
    """Let float32 products on a processor take their factors as bfloat16: twice as fast, and exact if they are.

    Sums stay in float32, which a plain bfloat16 product would round to 8 bits in the end.
    """
    import torch

    settings: Any = torch.backends.mkldnn.matmul
    kept = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = kept

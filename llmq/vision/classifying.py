"""The classes of pictures as a table: the likeliest five of each, with their probabilities."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmq.errors import LlmqError
from llmq.predictors import PICTURES, Input, Inputs, Predictor
from llmq.terminal import track
from llmq.vision.images import read_image
from llmq.vision.pixels import check_window

if TYPE_CHECKING:
    from llmq.types import Loaded

BATCH = 32  # pictures in memory
TOP = 5
TABLE = "predictions.csv"


class Classifying(Predictor):
    suffixes: ClassVar[frozenset[str]] = PICTURES

    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; the run's, else needed for more than 8 bits"
    )

    names: Mapping[int, str] = Field({}, description="of the outputs, where the weights name none")

    def check(self, item: Input, model: object) -> None:
        check_window(self.window)
        read_image(item.path, 3, self.window)

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write `predictions.csv`: file, class, probability, then the next likeliest classes; one row a picture."""
        model: Any = loaded.artifact.model
        known = model.names()
        top = min(TOP, model.outputs)
        numbers = ["", *map(str, range(2, top + 1))]
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", *(f"{column}{n}" for n in numbers for column in ("class", "probability"))])
            for begin in track(range(0, len(inputs.items), BATCH), "classifying"):
                items = inputs.items[begin : begin + BATCH]
                logits = model.logits(loaded, [read_image(item.path, 3, self.window) for item in items])
                if not bool(logits.isfinite().all()):
                    raise LlmqError("the network answers with numbers that are not finite")
                shares, classes = logits.double().softmax(1).topk(top)  # (pictures, top) each
                for item, share, best in zip(items, shares.tolist(), classes.tolist(), strict=True):
                    names = (known[i][-1] if known else self.names.get(i, str(i)) for i in best)
                    pairs = zip(names, share, strict=True)
                    table.writerow([item.name, *(each for name, p in pairs for each in (name, f"{p:.6f}"))])
        return len(inputs.items)

"""Pictures that a generator makes of a seed: one file each, and all of them in a grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from llmq.predictors import Inputs, Predictor
from llmq.terminal import Bar

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.types import Loaded

BATCH = 64  # pictures at a time
GAP = 2  # pixels between the pictures of the grid
GRID = "grid.png"


class Generating(Predictor):
    count: PositiveInt = Field(16, le=100_000, description="pictures to make")
    seed: int = Field(0, ge=0, description="the same seed makes the same pictures")

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write `0000.png` and so on, and `grid.png`."""
        from PIL import Image

        model: Any = loaded.artifact.model
        digits = max(4, len(str(self.count - 1)))
        bar = Bar("making pictures", self.count)
        made: list[ndarray] = []
        latents = model.latents(self.count, self.seed)
        for begin in range(0, self.count, BATCH):
            for image in model.generate(loaded, latents[begin : begin + BATCH]):  # (height, width, channels) each
                Image.fromarray(_flat(image)).save(folder / f"{len(made):0{digits}}.png")
                made.append(image)
                bar.advance()
        bar.close()
        Image.fromarray(_flat(_grid(made))).save(folder / GRID)
        return self.count


def _flat(image: ndarray) -> ndarray:
    return image[..., 0] if image.shape[2] == 1 else image


def _grid(images: list[ndarray]) -> ndarray:
    """The pictures in rows, as nearly square as their number allows, on white."""
    import numpy as np

    columns = math.ceil(math.sqrt(len(images)))
    height, width, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    made: ndarray = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        made[top : top + height, left : left + width] = image
    return made

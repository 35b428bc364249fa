"""scikit-learn's 1,797 real digits: 8x8 pixels, grey, ten classes (the test part of UCI's optical digits).

A seeded share of each class is held out; the same writers are on both sides. Ink is white, 17 levels on [0, 255].
"""

import hashlib
from functools import cache
from typing import ClassVar

from pydantic import Field

from llmq.types import Data, Expected, Split
from llmq.vision.images import Example, make_split


class Digits(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "gan"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/label"})

    held_out: float = Field(0.2, gt=0, lt=1, description="share of each class set aside")
    seed: int = Field(0, ge=0, lt=2**32)

    def expected(self) -> Expected:
        held_out = round(1797 * self.held_out)
        return Expected(1797 - held_out, held_out)

    def read(self) -> Split:
        return _read(self.held_out, self.seed)


@cache
def _read(held_out: float, seed: int) -> Split:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (n, 8, 8, 1)
    order = np.random.default_rng(seed).permutation(len(images))
    sides: tuple[list[Example], list[Example]] = ([], [])
    kept = {label: round((1 - held_out) * int(np.sum(digits.target == label))) for label in range(10)}
    for i in order.tolist():
        label = int(digits.target[i])
        sides[kept[label] <= 0].append(Example(f"digit {i}", images[i], label))
        kept[label] -= 1
    content = hashlib.sha256(images.tobytes() + digits.target.astype(np.uint8).tobytes()).hexdigest()
    digest = [content, str(held_out), str(seed)]
    return make_split(*sides, "image/label", digest, [str(label) for label in range(10)])

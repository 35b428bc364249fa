"""Seeded crops of three real photographs (temple, flower, portrait) that scikit-learn and matplotlib carry.

They have no labels: enough to calibrate a network, or to see how often two agree. Crops are squares of 192 pixels and
more, the photographs in turn; those for training come from one half of each photograph, held-out ones from the other.
Crops of one photograph overlap: a standard error over them is too small for photographs at large.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.files import sha256_files
from llmq.types import Data, Expected, Split
from llmq.vision.images import Example, make_split, read_image

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator

SMALLEST, LARGEST = 192, 448
CARRIED = (
    ("sklearn", "datasets/images/china.jpg", 1),
    ("sklearn", "datasets/images/flower.jpg", 1),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 0),
)
"""The package, the file, and the axis along which the photograph is parted: 0 upper and lower, 1 left and right."""


class Photographs(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "detector", "gan"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image"})

    train: PositiveInt = Field(192, description="crops to calibrate with")
    held_out: PositiveInt = Field(96, description="crops to be asked about")
    seed: int = Field(0, ge=0, lt=2**32)

    def check(self) -> None:
        _files()

    def expected(self) -> Expected:
        return Expected(self.train, self.held_out)

    def read(self) -> Split:
        return _read(self.train, self.held_out, self.seed)


def _files() -> list[Path]:
    from importlib.util import find_spec

    files = []
    for package, name, _ in CARRIED:
        spec = find_spec(package)
        path = Path(spec.origin).parent / name if spec and spec.origin else None
        if path is None or not path.is_file():
            raise UserError(
                f"{name} is carried by {package}, which is not installed here; use data.image_folder instead"
            )
        files.append(path)
    return files


@cache
def _read(train: int, held_out: int, seed: int) -> Split:
    import numpy as np

    files = _files()
    regions: tuple[list[ndarray], list[ndarray]] = ([], [])
    for file, (_, _, axis) in zip(files, CARRIED, strict=True):
        image = read_image(file)
        for side, part in zip(regions, np.split(image, [image.shape[axis] // 2], axis=axis), strict=True):
            side.append(part)
    names = [file.stem for file in files]
    crops = [
        [_crop(names[i % 3], halves[i % 3], np.random.default_rng([seed, side, i])) for i in range(n)]
        for side, (halves, n) in enumerate(zip(regions, (train, held_out), strict=True))
    ]
    return make_split(crops[0], crops[1], "image", [sha256_files(files), str(train), str(held_out), str(seed)])


def _crop(name: str, region: "ndarray", rng: "Generator") -> Example:
    side = int(rng.integers(SMALLEST, min(LARGEST, *region.shape[:2]) + 1))
    top, left = (int(rng.integers(0, length - side + 1)) for length in region.shape[:2])
    return Example(f"{name} {left},{top} {side}", region[top : top + side, left : left + side])

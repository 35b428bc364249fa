"""scikit-learn's 1,797 handwritten digits composed on a cluttered canvas, with their boxes, from a seed.

A scene is painted at each access, always the same. The last 357 digits, other writers than the first 1,440, are only
used for held-out scenes. A box encloses the ink of a digit, visible or covered. Easy scenes for every detector:
`{digits: [1, 4], scale: [24, 40], contrast: [0.8, 1], overlap: 0, clutter: 0, noise: 0.05, tilt: 0}`.
"""

from functools import cache, lru_cache
from typing import ClassVar

from pydantic import Field, PositiveInt

from llmq.data.scenes.painter import Difficulty, glyphs, paint
from llmq.errors import UserError
from llmq.types import Data, Expected, Split
from llmq.vision.images import Example, Lazily, make_split

FROM_THE_END = 357  # digits whose writers are only seen in held-out scenes
KEPT = 128 * 2**20  # bytes of held-out scenes that are kept


class Scenes(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"detector"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})

    train: PositiveInt = Field(40_000, description="scenes to learn from; each is painted when it is asked for")
    held_out: PositiveInt = Field(256, description="scenes to be asked about")
    size: PositiveInt = Field(128, ge=32, description="pixels of a side")
    digits: tuple[int, int] = Field((2, 8), description="digits in a scene, fewest and most")
    scale: tuple[float, float] = Field((10, 48), description="height of a digit in pixels, smallest and largest")
    contrast: tuple[float, float] = Field(
        (0.4, 1.0), description="ink: share of the way from what lies under it to black or white"
    )
    overlap: float = Field(0.2, ge=0, le=0.9, description="share of a digit's box that others may reach into")
    clutter: int = Field(8, ge=0, description="strokes, outlines and torn digits in a scene, most")
    noise: float = Field(0.06, ge=0, le=1, description="standard deviation of pixel noise, largest; 1 is white")
    tilt: float = Field(12.0, ge=0, le=45, description="degrees that a digit may lean")
    seed: int = Field(0, ge=0, lt=2**32)

    def check(self) -> None:
        bounds = {"digits": (0, 100), "scale": (6, self.size), "contrast": (0.05, 1)}
        for name, (low, high) in bounds.items():
            least, most = getattr(self, name)
            if not low <= least <= most <= high:
                raise UserError(f"{name} [{least:g}, {most:g}] must rise and lie within {low:g} and {high:g}")

    def expected(self) -> Expected:
        return Expected(self.train, self.held_out, self.size**2)

    def read(self) -> Split:
        return _read(self)


@cache
def _read(scenes: Scenes) -> Split:
    import hashlib

    how = Difficulty(**scenes.model_dump(exclude={"train", "held_out", "seed"}))
    first = len(glyphs()[0]) - FROM_THE_END
    writers = {"train": range(first), "held_out": range(first, first + FROM_THE_END)}

    def scene(name: str) -> Example:
        part, number = name.split("/")
        return paint(name, (scenes.seed, list(writers).index(part), int(number)), writers[part], how)

    # Every stage is scored on the held-out scenes; a training scene is seldom drawn twice.
    kept = lru_cache(maxsize=KEPT // (3 * scenes.size**2))(scene)
    train = Lazily([f"train/{i}" for i in range(scenes.train)], scene)
    held_out = Lazily([f"held_out/{i}" for i in range(scenes.held_out)], kept)
    # The hash covers painted pixels besides the settings: libraries may round differently.
    painted = hashlib.sha256(b"".join(e.image.tobytes() for e in [*train[:8], *held_out[:8]])).hexdigest()
    return make_split(train, held_out, "image/boxes", [scenes.model_dump_json(), painted], [str(d) for d in range(10)])

"""Scenes of digits: scikit-learn's handwritten digits on a cluttered canvas, painted from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from llmq.vision.images import Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw as Pen

Box = tuple[int, int, int, int]
EDGE = 0.35  # of the strongest ink; fainter pixels are no part of a digit's box
TRIES = 12  # places looked at for a digit before it is left out


@dataclass(frozen=True)
class Difficulty:
    """The settings of `data.scenes` that make a scene hard."""

    size: int
    digits: tuple[int, int]
    scale: tuple[float, float]
    contrast: tuple[float, float]
    overlap: float
    clutter: int
    noise: float
    tilt: float


@cache
def glyphs() -> tuple[ndarray, ndarray]:
    """All 1,797 digits as float32 `(n, 8, 8)` of ink from 0 to 1, in the order of their writers, and their labels."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def paint(name: str, seed: tuple[int, ...], sources: range, how: Difficulty) -> Example:
    """The scene of a seed, with digits out of `sources`; boxes enclose the ink above EDGE."""
    import numpy as np

    rng = np.random.default_rng(seed)
    canvas = _background(rng, how)
    for _ in range(rng.integers(how.clutter + 1)):
        _clutter(rng, canvas, sources, how)
    boxes: list[Box] = []
    labels: list[int] = []
    for _ in range(rng.integers(how.digits[0], how.digits[1] + 1)):
        which = int(rng.integers(sources.start, sources.stop))
        ink = _ink(which, rng, how)
        box = _place(rng, ink.shape, boxes, how)
        if box is not None:
            _blend(canvas, ink, box, _colour_against(rng, canvas, box, how))
            boxes.append(box)
            labels.append(int(glyphs()[1][which]))
    start = int(rng.integers(len(_noise(canvas.size)) - canvas.size + 1))
    canvas += (how.noise * rng.random()) * _noise(canvas.size)[start : start + canvas.size].reshape(canvas.shape)
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Example(name, image, boxes=np.array(boxes, np.float32).reshape(-1, 4), labels=np.array(labels, np.int64))


@cache
def _noise(size: int) -> ndarray:
    """White noise of which each scene cuts a piece of `size`: drawing it anew would take most of a scene's time."""
    import numpy as np

    made: ndarray = np.random.default_rng(0).standard_normal(size + (1 << 20), np.float32)
    return made


def _background(rng: Generator, how: Difficulty) -> ndarray:
    """A colour that drifts over the canvas; with clutter, a coarse texture is added."""
    import numpy as np

    grids = [2] + ([int(rng.integers(4, 17))] if how.clutter else [])  # the coarser, the smoother
    colours: ndarray = np.full(
        (3, how.size, how.size), 0.15 + 0.7 * rng.random(), np.float32
    )  # (channels, height, width)
    for n in grids:
        rows, texture = _weights(n, how.size), (rng.random((n, n, 3), np.float32) - 0.5) * 0.3
        colours += rows @ texture.transpose(2, 0, 1) @ rows.T  # (3, size, size): bilinear, by two products
    made: ndarray = np.ascontiguousarray(colours.clip(0, 1).transpose(1, 2, 0))
    return made


@cache
def _weights(source: int, target: int) -> ndarray:
    """The matrix `(target, source)` of bilinear resizing, sample centres aligned."""
    import numpy as np

    at = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    made: ndarray = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(source)[None])).astype(np.float32)
    return made


@cache
def _glyph(which: int) -> Picture:
    """A digit cut to its ink with a blank pixel around it, as a picture of floats."""
    import numpy as np
    from PIL import Image

    glyph = glyphs()[0][which]
    rows, columns = np.flatnonzero(glyph.any(1)), np.flatnonzero(glyph.any(0))
    return Image.fromarray(np.pad(glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1))


def _ink(which: int, rng: Generator, how: Difficulty) -> ndarray:
    """A digit at a random height, width and tilt, cut to the ink: float32 `(h, w)` from 0 to 1."""
    import numpy as np
    from PIL import Image

    glyph = _glyph(which)
    unit = rng.uniform(*how.scale) / (glyph.height - 2)
    across, angle = unit * rng.uniform(0.85, 1.2), math.radians(rng.uniform(-how.tilt, how.tilt))
    cos, sin = math.cos(angle), math.sin(angle)
    width = math.ceil(glyph.width * across * cos + glyph.height * unit * abs(sin))
    height = math.ceil(glyph.height * unit * cos + glyph.width * across * abs(sin))
    # From a pixel of the picture back to one of the glyph: turned about the middles, then scaled.
    to_glyph = (
        *(cos / across, sin / across, glyph.width / 2 - (cos * width + sin * height) / 2 / across),
        *(-sin / unit, cos / unit, glyph.height / 2 - (cos * height - sin * width) / 2 / unit),
    )
    turned = glyph.transform((width, height), Image.Transform.AFFINE, to_glyph, Image.Resampling.BILINEAR)
    ink = np.minimum(np.asarray(turned) * 1.3, 1)
    seen = ink > EDGE
    rows, columns = seen.any(1).nonzero()[0], seen.any(0).nonzero()[0]
    made: ndarray = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return made


def _place(rng: Generator, shape: tuple[int, int], taken: Sequence[Box], how: Difficulty) -> Box | None:
    """A box `(x0, y0, x1, y1)` within the canvas that hides no more of another than `overlap`, or None."""
    height, width = shape
    if max(shape) > how.size:
        return None
    for _ in range(TRIES):
        x, y = (int(rng.integers(how.size - n + 1)) for n in (width, height))
        box = (x, y, x + width, y + height)
        if all(_hidden(box, other) <= how.overlap for other in taken):
            return box
    return None


def _hidden(box: Box, other: Box) -> float:
    """The share of the smaller of two boxes that lies within the other."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return max(0, width) * max(0, height) / smaller


def _blend(canvas: ndarray, ink: ndarray, box: Box, colour: ndarray) -> None:
    part = canvas[box[1] : box[3], box[0] : box[2]]
    part += ink[..., None] * (colour - part)


def _colour_against(rng: Generator, canvas: ndarray, box: Box, how: Difficulty) -> ndarray:
    """A tinted colour lighter or darker than the mean under `box`: a random share of the way to white or to black."""
    import numpy as np

    seen = canvas[box[1] : box[3] : 3, box[0] : box[2] : 3].reshape(-1, 3)
    under = np.add.reduce(seen) / np.float32(len(seen))  # mean() takes 1.6 times as long, 3 times for three numbers
    lighter = rng.random() < 1.5 - 2 * (np.add.reduce(under) / np.float32(3))  # never on bright ground; always on dark
    contrast = rng.uniform(*how.contrast) - 0.2 * rng.random(3) * rng.random()
    made: ndarray = (under + (lighter - under) * np.maximum(contrast, how.contrast[0] / 2)).astype(np.float32)
    return made


def _clutter(rng: Generator, canvas: ndarray, sources: range, how: Difficulty) -> None:
    """One thing that is no digit: a stroke, an outline, or a torn digit."""
    ink = (_stroke, _outline, _torn)[int(rng.integers(3))](rng, sources, how)
    box = _place(rng, ink.shape, [], how)
    if box is not None:
        _blend(canvas, ink, box, _colour_against(rng, canvas, box, how))


def _drawn(rng: Generator, how: Difficulty, draw: Callable[[Pen, float, float, int], None]) -> ndarray:
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = (int(n) for n in rng.uniform(*how.scale, 2))
    image = Image.new("L", (width + 1, height + 1))
    draw(ImageDraw.Draw(image), width, height, int(rng.integers(1, 4)))
    made: ndarray = np.asarray(image, np.float32) / 255
    return made


def _stroke(rng: Generator, sources: range, how: Difficulty) -> ndarray:
    flip = bool(rng.integers(2))
    return _drawn(rng, how, lambda d, w, h, thick: d.line((0, h * flip, w, h * (not flip)), fill=255, width=thick))


def _outline(rng: Generator, sources: range, how: Difficulty) -> ndarray:
    start = int(rng.integers(360))
    return _drawn(rng, how, lambda d, w, h, thick: d.arc((0, 0, w, h), start, start + 200, fill=255, width=thick))


def _torn(rng: Generator, sources: range, how: Difficulty) -> ndarray:
    """A digit whose quarters have changed places: ink of the same kind, but no digit."""
    import numpy as np

    ink = _ink(int(rng.integers(sources.start, sources.stop)), rng, how)
    height, width = ink.shape
    made: ndarray = np.roll(ink[:, ::-1], (height // 2, width // 2), (0, 1))
    return made

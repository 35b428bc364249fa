"""Scale bars of pictures whose pixels have a known size."""

from __future__ import annotations

from math import floor, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

SHARE = 0.4
"""The share of a picture's width that a bar takes at most."""


def length(width: int, pixel_size: float) -> float:
    """The length of the bar in micrometres: 1, 2 or 5 times a power of ten, the longest that fits the width."""
    most = SHARE * width * pixel_size
    unit = 10.0 ** floor(log10(most))
    return next(step * unit for step in (5, 2, 1, 0.5) if step * unit <= most)  # 0.5: log10 may round up to a power


def label(width: int, pixel_size: float | None) -> str:
    """The length of the bar as text; empty where the size of a pixel is unknown."""
    return f"{length(width, pixel_size):g} µm" if pixel_size else ""


def stamped(image: ndarray, pixel_size: float | None) -> ndarray:
    """The uint8 image `(height, width, channels)` with a white bar in a black frame, if the size is known."""
    if not pixel_size:
        return image
    image = image.copy()
    height, width = image.shape[:2]
    pixels = max(1, round(length(width, pixel_size) / pixel_size))
    image[height - 8 : height - 3, 3 : 5 + pixels] = 0
    image[height - 7 : height - 4, 4 : 4 + pixels] = 255
    return image

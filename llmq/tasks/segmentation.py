"""Pores and grains: the threshold between them, and what a petrophysicist reads off the two phases. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def otsu(images: Sequence[Any]) -> int | None:
    """The grey level, up to which pixels are pore, that parts uint8 images into two classes (Otsu 1979).

    It maximises the variance between the classes over one histogram of all images; of equals, the lowest. None where
    all pixels are of one grey level.
    """
    counts = np.sum([np.bincount(np.ravel(image), minlength=256) for image in images], axis=0).astype(np.float64)
    if np.count_nonzero(counts) < 2:
        return None
    below, levels = counts.cumsum(), np.arange(256)
    mass = (counts * levels).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return int(np.nan_to_num(between, nan=-1.0).argmax())


def two_point(pores: Any, distance: int) -> Any:
    """The chance that two points 1, 2, … `distance` pixels apart are both pore, the mean of rows and columns.

    Of the pairs that lie within the image; `pores` is boolean `(height, width)` and longer than `distance`.
    """
    chances = []
    for r in range(1, distance + 1):
        down, right = pores[r:] & pores[:-r], pores[:, r:] & pores[:, :-r]
        chances.append((down.mean() + right.mean()) / 2)
    return np.array(chances)

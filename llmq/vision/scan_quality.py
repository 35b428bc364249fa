"""What a scan tells without truth: its noise and blur against cleaner images, the width of edges, noise in flat places.

Images are grey levels of 255, `(height, width)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

TILE = 64  # pixels of a side, of squares whose spectra are averaged
SMALLEST = 16
BLURS = 61
"""Blurs that are tried, from 0 in steps of 0.05 pixels."""
FLAT = 50
"""The fewest flat pixels of an image that tell its noise."""


def noise_and_blur(scans: Sequence[ndarray], clean: Sequence[ndarray]) -> tuple[float, float]:
    """The sigmas of noise (grey levels) and blur (pixels) of scans, against clean images of the same kind of scene.

    The spectra of power are fitted, scans = a · clean · exp(-(2 pi f blur)²) + noise², by least squares of relative
    errors. The contrast a may differ; noise is taken as white.
    """
    import numpy as np
    from scipy.optimize import nnls

    side = min(TILE, *(min(image.shape) for image in (*scans, *clean)))
    if side < SMALLEST:
        raise UserError(f"images of {side} pixels tell no noise and blur; {SMALLEST} a side are needed")
    if not all(any(np.ptp(image) for image in images) for images in (scans, clean)):
        raise UserError("images of one grey level tell no noise and blur; is the window that of the scan?")
    (f, seen), (_, whole) = spectrum(scans, side), spectrum(clean, side)
    fits = []
    for blur in np.arange(BLURS) * 0.05:
        columns = np.stack([whole * np.exp(-((2 * np.pi * f * blur) ** 2)), np.ones_like(f)], 1) / seen[:, None]
        (_, power), error = nnls(columns, np.ones_like(f))
        fits.append((error, float(blur), float(power)))
    _, blur, power = min(fits)
    return power**0.5, blur


def spectrum(images: Sequence[ndarray], side: int) -> tuple[ndarray, ndarray]:
    """Frequencies in 1/pixel up to 0.5, and the power there: white noise has its variance everywhere.

    The mean over directions and over Hann-windowed squares of `side` pixels, half a square apart, each less its mean.
    """
    import numpy as np

    window = np.outer(*[np.hanning(side + 1)[:-1]] * 2)  # (side, side)
    total, count = np.zeros((side, side)), 0
    for image in images:
        views = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (side, side))
        squares = views[:: side // 2, :: side // 2].reshape(-1, side, side)
        squares = (squares - squares.mean((1, 2), keepdims=True)) * window
        total += (np.abs(np.fft.fft2(squares)) ** 2).sum(0)
        count += len(squares)
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side)] * 2))  # (side, side)
    ring = np.rint(radius * side).astype(int).ravel()
    power = np.bincount(ring, (total / count / (window**2).sum()).ravel()) / np.bincount(ring)
    kept = slice(2, side // 2)  # the window spreads the mean over the lowest two
    return np.arange(len(power))[kept] / side, np.maximum(power[kept], 1e-9)


def edge_width(image: ndarray, pores: ndarray) -> float | None:
    """The width of edges in pixels: the contrast of the phases over the median gradient along their boundary.

    A Gaussian edge of sigma s has sqrt(2 pi) s. None without a boundary or without contrast.
    """
    import numpy as np
    from scipy.ndimage import binary_dilation, binary_erosion

    edges = binary_dilation(pores) & ~binary_erosion(pores, border_value=1)
    if not edges.any() or pores.all():
        return None
    grey: ndarray = image.astype(np.float64)
    steepness = float(np.median(np.hypot(*np.gradient(grey))[edges]))
    contrast = float(abs(np.median(grey[pores]) - np.median(grey[~pores])))
    return contrast / steepness if steepness > 0 and contrast > 0 else None


def noise_power(image: ndarray, pores: ndarray, reach: int, smooth: float) -> float | None:
    """The variance of grey levels in flat places, `reach` pixels and more from a boundary, less their smooth part.

    The smooth part is a Gaussian mean of sigma `smooth` over flat places. None with fewer than `FLAT` such pixels.
    """
    import numpy as np
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    both = [p for p in (pores, ~pores) if p.any()]
    depth = sum(distance_transform_edt(p) for p in both) if len(both) == 2 else np.full(image.shape, np.inf)
    flat = depth > reach
    if flat.sum() < FLAT:
        return None
    total = 0.0
    for phase in both:  # a mean over both would see their contrast
        place = (flat & phase).astype(np.float64)
        weight = gaussian_filter(place, smooth, mode="constant")
        mean = gaussian_filter(image * place, smooth, mode="constant") / np.maximum(weight, 1e-12)
        total += float((((image - mean) * place) ** 2).sum())
    return total / float(flat.sum())

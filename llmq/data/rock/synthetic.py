"""Synthetic micro-CT slices from a seed: grains and pores as a scanner and its reconstruction show them."""

import numpy as np
from numpy import ndarray

PORE, GRAIN, HEAVY = 75.0, 155.0, 205.0  # grey levels of 255: air, quartz, and a denser mineral
HEAVY_SHARE = 0.04  # of the slice
FINER = 2  # the rock is drawn on pixels half as large, so that a pixel on an edge holds both phases
ROUGHNESS = ((1.0, 1.0), (0.35, 1 / 3), (0.12, 1 / 8))  # weight and length of each scale, against the largest
POINT_SPREAD = 0.6  # sigma of the scanner's blur, pixels
RING = 1.0  # sigma of the error that correction leaves of a detector pixel's gain, grey levels


def rock_slice(rng: np.random.Generator, size: int, porosity: float, grain: float, noise: float) -> ndarray:
    """A square slice, uint8 `(size, size, 1)`.

    `porosity` is the share of pores; `grain`, in pixels, the correlation length of the rock; `noise`, in grey levels,
    the sigma of the noise that denoising leaves. A pixel is the mean of its area (partial volume), then blurred; rings
    run around the axis of rotation.
    """
    return _scanned(rng, 2, size, porosity, grain, noise)


def rock_volume(rng: np.random.Generator, size: int, porosity: float, grain: float, noise: float) -> ndarray:
    """A cube, uint8 `(size, size, size, 1)`, drawn as a slice is; rings run around an axis along z."""
    return _scanned(rng, 3, size, porosity, grain, noise)


def _scanned(
    rng: np.random.Generator, dimensions: int, size: int, porosity: float, grain: float, noise: float
) -> ndarray:
    from scipy.ndimage import gaussian_filter

    shape = (size * FINER,) * dimensions
    rock, minerals = _field(rng, shape, grain * FINER), _field(rng, shape, 2 * grain * FINER)
    phases = np.where(minerals > np.quantile(minerals, 1 - HEAVY_SHARE), HEAVY, GRAIN)
    phases = np.where(rock < np.quantile(rock, porosity), PORE, phases)
    parts = phases.reshape(*[size, FINER] * dimensions)
    seen = parts.mean(tuple(range(1, 2 * dimensions, 2)))  # (size, size) or (size, size, size)
    seen = gaussian_filter(seen, POINT_SPREAD, mode="nearest")
    axis = rng.uniform(-0.5, 1.5, (2, 1, 1)) * size
    radius = np.hypot(*(np.indices((size, size)) - axis)).astype(int)  # (size, size), pixels
    seen += RING * rng.standard_normal(radius.max() + 1)[radius]
    seen += noise * rng.standard_normal(seen.shape)
    levels: ndarray = np.floor(np.clip(seen, 0, 255) + 0.5).astype(np.uint8)[..., None]
    return levels


def _field(rng: np.random.Generator, shape: tuple[int, ...], length: float) -> ndarray:
    """White noise smoothed by Gaussians of three widths, added up; periodic."""
    *others, last = shape
    squared = np.fft.rfftfreq(last) ** 2  # (last // 2 + 1,), of the frequency along the last axis
    for i, side in enumerate(reversed(others), 1):
        squared = np.fft.fftfreq(side).reshape(-1, *[1] * i) ** 2 + squared  # one axis more
    # A wider Gaussian leaves less of white noise, in proportion to its width.
    transfer = sum(
        weight * share ** (len(shape) / 2) * np.exp(-2 * (np.pi * share * length) ** 2 * squared)
        for weight, share in ROUGHNESS
    )
    axes = tuple(range(len(shape)))
    field: ndarray = np.fft.irfftn(np.fft.rfftn(rng.standard_normal(shape)) * transfer, shape, axes)
    return field

"""Low-resolution images out of high-resolution ones, by kernels that are stated. Pure.

`resize` is MATLAB's `imresize`: a kernel stretched by the factor when the image shrinks (antialiasing), its weights
normalised, the image mirrored at its edges. `KERNELS` are the kernels of DRSRD1's "unknown" downsampling.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def _cubic(x: Any) -> Any:
    """Keys 1981, a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _lanczos(lobes: int) -> Callable[[Any], Any]:
    return lambda x: np.where(np.abs(x) < lobes, np.sinc(x) * np.sinc(x / lobes), 0.0)


def _box(x: Any) -> Any:
    return ((x >= -0.5) & (x < 0.5)).astype(float)


KERNELS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "box": (_box, 1),
    "triangle": (lambda x: np.maximum(0.0, 1 - np.abs(x)), 2),
    "cubic": (_cubic, 4),
    "lanczos2": (_lanczos(2), 4),
    "lanczos3": (_lanczos(3), 6),
}
"""Each kernel with the width of its support, in pixels of the smaller image."""


def weights(size: int, target: int, kernel: str = "cubic") -> Any:
    """The matrix `(target, size)` that resizes a line of `size` pixels, its rows adding up to 1."""
    function, support = KERNELS[kernel]
    stretch = max(1.0, size / target)
    centres = (np.arange(target) + 0.5) * size / target - 0.5
    first = np.floor(centres - support * stretch / 2).astype(int)
    places = first[:, None] + np.arange(int(np.ceil(support * stretch)) + 2)
    values = function((centres[:, None] - places) / stretch)
    values /= values.sum(1, keepdims=True)
    around = places % (2 * size)
    mirrored = np.where(around < size, around, 2 * size - 1 - around)
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), values)
    return matrix


def resize(image: Any, height: int, width: int, kernel: str = "cubic") -> Any:
    """An image `(height, width, channels)` of another size, float64, unclipped."""
    image = np.asarray(image, dtype=np.float64)
    rows, columns = weights(image.shape[0], height, kernel), weights(image.shape[1], width, kernel)
    return np.einsum("ya,abc,xb->yxc", rows, image, columns, optimize=True)


def to_uint8(image: Any) -> Any:
    """Grey levels as an image file holds them: clipped to [0, 255], halves rounded up."""
    return np.floor(np.clip(image, 0, 255) + 0.5).astype(np.uint8)


def downsample(image: Any, scale: int, kernel: str = "cubic") -> Any:
    """The low-resolution uint8 image of one whose sides `scale` divides."""
    return to_uint8(resize(image, image.shape[0] // scale, image.shape[1] // scale, kernel))


def disturb(low: Any, rng: np.random.Generator, noise: float, blur: float) -> Any:
    """A uint8 image with Gaussian blur and noise; both sigmas are drawn between 0 and what is given."""
    from scipy.ndimage import gaussian_filter

    spread, level = blur * rng.random(), noise * rng.random()
    blurred = gaussian_filter(np.asarray(low, dtype=np.float64), (spread, spread, 0))
    return to_uint8(blurred + level * rng.standard_normal(low.shape))


def bicubic(low: Any, scale: int) -> Any:
    """What cubic interpolation makes of a low-resolution image, float64, unclipped."""
    return resize(low, low.shape[0] * scale, low.shape[1] * scale)


def phases(scale: int) -> Any:
    """Cubic interpolation as `scale`² kernels of 5 x 5, in the order of the pixels of the square that one becomes."""
    middle = weights(9, 9 * scale)[4 * scale : 5 * scale, 2:7]
    return np.einsum("ia,jb->ijab", middle, middle).reshape(scale**2, 5, 5)

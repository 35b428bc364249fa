"""Low-resolution images made of high-resolution ones by stated kernels.

`resize` is MATLAB's `imresize`: a kernel stretched by the factor when the image shrinks (antialiasing), its weights
normalised, the image mirrored at its edges. `KERNELS` are the kernels of DRSRD1's "unknown" downsampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray


def _cubic(x: ndarray) -> ndarray:
    x = np.abs(x)  # Keys 1981, a = -0.5
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    values: ndarray = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    return values


def _lanczos(lobes: int) -> Callable[[ndarray], ndarray]:
    return lambda x: np.where(np.abs(x) < lobes, np.sinc(x) * np.sinc(x / lobes), 0.0)


KERNELS: dict[str, tuple[Callable[[ndarray], ndarray], int]] = {
    "box": (lambda x: ((x >= -0.5) & (x < 0.5)).astype(float), 1),
    "triangle": (lambda x: np.maximum(0.0, 1 - np.abs(x)), 2),
    "cubic": (_cubic, 4),
    "lanczos2": (_lanczos(2), 4),
    "lanczos3": (_lanczos(3), 6),
}
"""Each kernel with the width of the support, in pixels of the smaller image."""


def weights(size: int, target: int, kernel: str = "cubic") -> ndarray:
    """The matrix `(target, size)` that resizes a line of `size` pixels; each row sums to 1."""
    function, support = KERNELS[kernel]
    stretch = max(1.0, size / target)
    centres = (np.arange(target) + 0.5) * size / target - 0.5  # of the new pixels, among the old ones
    first = np.floor(centres - support * stretch / 2).astype(int)
    places = first[:, None] + np.arange(int(np.ceil(support * stretch)) + 2)  # (target, neighbours)
    values = function((centres[:, None] - places) / stretch)
    values /= values.sum(1, keepdims=True)
    around = places % (2 * size)  # the line and its mirror image, in turn
    mirrored = np.where(around < size, around, 2 * size - 1 - around)
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), values)
    return matrix


def resize(image: ndarray, height: int, width: int, kernel: str = "cubic") -> ndarray:
    """Resize an image `(…, height, width, channels)`; the result is float64 and not clipped."""
    image = np.asarray(image, dtype=np.float64)
    rows, columns = weights(image.shape[-3], height, kernel), weights(image.shape[-2], width, kernel)
    resized: ndarray = np.einsum("ya,...abc,xb->...yxc", rows, image, columns, optimize=True)
    return resized


def _resized(image: ndarray, sides: Sequence[int], kernel: str = "cubic") -> ndarray:
    """An image or a volume of other sides; a volume slice by slice, and then across them."""
    made = resize(image, sides[-2], sides[-1], kernel)
    if len(sides) == 3:
        made = np.tensordot(weights(len(image), sides[0], kernel), made, 1)
    return made


def to_uint8(image: ndarray) -> ndarray:
    """Round grey levels to the bytes of an image file: clipped to [0, 255], halves rounded up."""
    levels: ndarray = np.floor(np.clip(image, 0, 255) + 0.5).astype(np.uint8)
    return levels


def downsample(image: ndarray, scale: int, kernel: str = "cubic") -> ndarray:
    """Shrink an image or a volume by `scale`, a divisor of all sides, and round the result to uint8."""
    return to_uint8(_resized(image, [side // scale for side in image.shape[:-1]], kernel))


@dataclass(frozen=True)
class Disturbance:
    """The blur and noise of a scanner: sigmas are drawn evenly, from the first number to the second of each range."""

    noise: tuple[float, float]  # grey levels
    blur: tuple[float, float]  # pixels

    def of(self, image: ndarray, rng: np.random.Generator) -> ndarray:
        """Blur a uint8 image or volume `(…, channels)`, and add Gaussian noise."""
        from scipy.ndimage import gaussian_filter

        spread, level = rng.uniform(*self.blur), rng.uniform(*self.noise)
        blurred = gaussian_filter(image.astype(np.float64), (*[spread] * (image.ndim - 1), 0))
        return to_uint8(blurred + level * rng.standard_normal(image.shape))


def bicubic(low: ndarray, scale: int) -> ndarray:
    """Enlarge an image or a volume by cubic interpolation; the result is float64 and not clipped."""
    return _resized(low, [side * scale for side in low.shape[:-1]])


def phases(scale: int) -> ndarray:
    """Cubic interpolation as `scale`² kernels of 5 x 5, in the order of the pixels that one pixel becomes."""
    middle = weights(9, 9 * scale)[4 * scale : 5 * scale, 2:7]  # (scale, 5): far from every edge
    kernels: ndarray = np.einsum("ia,jb->ijab", middle, middle).reshape(scale**2, 5, 5)
    return kernels

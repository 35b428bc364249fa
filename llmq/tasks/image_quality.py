"""How near one image is to another: PSNR and SSIM, the same whatever scale the two are given on. Pure."""

from typing import Any

Range = float | tuple[float, float]
MOST = 100.0
"""dB that a pair of images counts at most in a mean, where they are off by 0.003 of 255 grey levels."""
SMALLEST = 6
"""Pixels that SSIM needs on a side, half of its window being reflected there."""
SSIM_PROTOCOL = "Gaussian window of 11x11, sigma 1.5, K1 0.01, K2 0.03, reflected at the edges"


def unit_scale(image: Any, data_range: Range) -> Any:
    """An array or tensor as float64 on [0, 1]: `data_range` is where black and white lie, `255` short for `(0, 255)`.

    SSIM weighs the mean brightness against a constant, so that an image on [-1, 1] is another image than on [0, 1]
    unless it is brought back first.
    """
    import numpy as np

    black, white = data_range if isinstance(data_range, tuple) else (0.0, data_range)
    if not white > black:
        raise ValueError(f"data range {data_range} is empty")
    return (np.asarray(image, dtype=np.float64) - black) / (white - black)


def psnr(image: Any, truth: Any, data_range: Range) -> float:
    """Peak signal-to-noise ratio in dB of two images of one shape; infinite if they are equal.

    10 log10(range² / mean squared difference), the mean over pixels and channels.
    """
    import numpy as np

    a, b = _alike(image, truth, data_range)
    error = float(np.mean((a - b) ** 2))
    return float(-10 * np.log10(error)) if error else float("inf")


def capped_psnr(image: Any, truth: Any, data_range: Range) -> float:
    """`psnr`, at most `MOST`: equal images have a mean with others."""
    return min(MOST, psnr(image, truth, data_range))


def ssim(image: Any, truth: Any, data_range: Range) -> float:
    """Mean structural similarity (Wang et al. 2004) of two images `(height, width)` or `(height, width, channels)`.

    See `SSIM_PROTOCOL`; channels are averaged. Raises `ValueError` for images under 6 pixels on a side.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _alike(image, truth, data_range)
    if min(a.shape[:2]) < SMALLEST:
        raise ValueError(f"SSIM needs {SMALLEST} pixels on a side, this image is {a.shape}")
    pair = [torch.from_numpy(x.reshape(*x.shape[:2], -1)).permute(2, 0, 1)[None] for x in (a, b)]
    similarity: Any = structural_similarity_index_measure(pair[0], pair[1], data_range=1.0)
    return float(similarity)


def _alike(image: Any, truth: Any, data_range: Range) -> tuple[Any, Any]:
    a, b = unit_scale(image, data_range), unit_scale(truth, data_range)
    if a.shape != b.shape:
        raise ValueError(f"images of {a.shape} and {b.shape} cannot be compared pixel by pixel")
    return a, b


def is_flat(image: Any) -> bool:
    """Whether an image has one value everywhere, so that there is nothing to be made sharper."""
    import numpy as np

    return bool(np.ptp(np.asarray(image)) == 0)


def without_border(image: Any, pixels: int) -> Any:
    """An image `(height, width, ...)` less its outermost `pixels`, where upscalers see only half of a neighbourhood."""
    return image[pixels : image.shape[0] - pixels, pixels : image.shape[1] - pixels]


def luma(image: Any) -> Any:
    """Y of an image `(height, width, 3)` on [0, 255], on [16, 235] (ITU-R BT.601); of one channel, that channel."""
    import numpy as np

    image = np.asarray(image, dtype=np.float64)
    if image.ndim == 2 or image.shape[2] == 1:
        return image.reshape(image.shape[:2])
    return 16 + image @ np.array([65.481, 128.553, 24.966]) / 255

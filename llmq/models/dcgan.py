"""Generators of images out of noise."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.data.images import Example
from llmq.errors import LlmqError, UserError, did_you_mean
from llmq.files import sha256_files, sha256_text
from llmq.models.carried import carried
from llmq.models.vision import Learning, Player, Vision, in_batches
from llmq.types import Loaded, Model, Split

BUILT_IN = "gan-faces"
BATCH = 64
SIZE = 64


class Dcgan(Vision, Model):
    """The 64x64 DCGAN generator (Radford et al. 2015): random, given weights, or `gan-faces`.

    `gan-faces` is trained on the rendered faces of DigiFace1M. Weights hold the generator alone; a training begins with
    a discriminator of its own. Latents are standard normal, as in most uses since; the paper's are uniform.
    """

    kind: ClassVar[str] = "gan"
    suite: ClassVar[str] = "gan"
    learning: ClassVar[Learning] = Learning(
        2e-4, BATCH, "nats", "adam", (0.5, 0.999), autocast=True, channels_last=True
    )

    watched_from: ClassVar[int] = 2

    latent_size: PositiveInt = Field(100, description="numbers that an image is made of")
    features: PositiveInt = Field(64, description="channels of the widest layer before the image; 128 in the paper")
    channels: PositiveInt = Field(3, description="1 for grey images, 3 for colour")

    def check(self) -> None:
        """Raise `UserError` for weights that are not there or cannot be opened."""
        if self.weights == BUILT_IN:
            _faces()
            return
        try:
            super().check()
        except UserError as error:
            raise UserError(f"{error}{did_you_mean(str(self.weights), [BUILT_IN])}") from None

    def network(self) -> Any:
        """The generator, with the paper's initialization."""
        from llmq.models.dcgan_networks import Generator

        return Generator(self.latent_size, self.features, self.channels)

    def pretrained(self) -> Mapping[str, Any] | None:
        """The generator's tensors; of `gan-faces`, a pickled file, tensors alone."""
        if self.weights != BUILT_IN:
            return super().pretrained()
        from llmq.models.state import read_pickle

        state = read_pickle(_faces()).get("netG_state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{BUILT_IN!r}: {str(_faces())!r} holds no 'netG_state_dict'; install its package again")
        return state

    def source(self) -> str:
        """Where the weights come from."""
        if self.weights != BUILT_IN:
            return super().source()
        return f"{BUILT_IN}: gan_face_generate 1.1.1, {sha256_files([_faces()])[:16]}"

    def prepare(self, images: Sequence[Any]) -> Any:
        """Real images on [-1, 1] for the discriminator: the shorter side scaled to 64 pixels, the middle cut out."""
        import torch

        return torch.cat([_square(torch.from_numpy(image.copy())) for image in images])

    def latents(self, n: int, seed: int, purpose: str = "samples") -> Any:
        """Standard normal latents `(n, latent_size, 1, 1)`, others for each purpose."""
        import torch

        generator = torch.Generator().manual_seed(int(sha256_text(purpose, str(seed))[:15], 16))
        return torch.randn(n, self.latent_size, 1, 1, generator=generator)

    def example(self, batch_size: int) -> Any:
        """Latents."""
        return self.latents(batch_size, 0, "example")

    def calibration(self, split: Split | None, samples: int, seed: int) -> Iterator[Any]:
        """Latents, one at a time. Raises `UserError` for data: a generator is calibrated on noise."""
        if split is not None:
            raise UserError("models.dcgan draws latents to calibrate on; leave 'data' out")
        yield from self.latents(samples, seed, "calibration").split(1)

    def pictures(self, loaded: Loaded, split: Split | None, n: int, seed: int) -> Iterator[Any]:
        """What a stage makes of `n` latents that are the same for every stage: grey levels, float64 on [0, 255]."""
        return self._made(loaded, self.latents(n, seed))

    def generate(self, loaded: Loaded, latents: Any) -> list[Any]:
        """Images uint8 `(64, 64, channels)`, one of each latent. Raises `LlmqError` for numbers that are not finite."""
        import numpy as np

        made = list(self._made(loaded, latents))
        if not all(np.isfinite(image).all() for image in made):
            raise LlmqError("models.dcgan: the generator makes values that are not finite numbers")
        return [image.round().astype("uint8") for image in made]

    def framed(self, images: Sequence[Any]) -> list[Any]:
        """Real images uint8 as the generator would have to make them, `(64, 64, channels)`."""
        return [
            grey.round().astype("uint8") for part in in_batches(images, BATCH) for grey in _grey(self.prepare(part))
        ]

    def _made(self, loaded: Loaded, latents: Any) -> Iterator[Any]:
        import torch

        for part in latents.split(BATCH):
            with torch.inference_mode():
                made = loaded.module(part.to(loaded.device))
            yield from _grey(made)

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for data without images, or with images of other channels."""
        if split.shape not in ("image", "image/label"):
            raise UserError(f"models.dcgan: its examples are {split.shape}, and image or image/label is needed")
        examples = split.train or split.held_out
        if examples and examples[0].image.shape[2] != self.channels:
            has = examples[0].image.shape[2]
            raise UserError(
                f"models.dcgan: {examples[0].name!r} has {has} channels, and this generator makes {self.channels}; "
                f"set model.channels to {has}, or read the images with {self.channels}"
            )

    def players(self, network: Any) -> list[Player]:
        """The discriminator, new under torch's seed, then the generator; each sees what the other has learnt."""
        import torch

        from llmq.models.dcgan_networks import Discriminator, discriminator_loss, generator_loss

        discriminator = Discriminator(self.features, self.channels)

        def tells(batch: Mapping[str, Any]) -> Any:
            with torch.no_grad():
                made = network(batch["latents"])
            return discriminator_loss(discriminator, batch["images"], made)

        def fools(batch: Mapping[str, Any]) -> Any:
            return generator_loss(discriminator, network(batch["latents"]))

        return [Player("discriminator", discriminator, tells), Player("generator", network, fools)]

    def batch(self, examples: Sequence[Example], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """Real images and as many latents. They are not cropped: where a face stands in its frame is learnt too."""
        import torch

        if crop is not None:
            raise UserError(f"crop {crop}: a generator learns from whole images; leave it out")
        images = self.prepare([example.image for example in examples])
        if augment != "none":
            flipped = torch.from_numpy(rng.random(len(images)) < 0.5)
            images[flipped] = images[flipped].flip(-1)
        latents = rng.standard_normal((len(images), self.latent_size, 1, 1), dtype="float32")
        return {"images": images, "latents": torch.from_numpy(latents)}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The Fréchet distance of samples from held-out images, both shrunk to 4x4 pixels: rough, but at once."""
        from llmq.tasks.gaussians import frechet_distance

        made = self.generate(loaded, self.latents(len(examples), 0, "validation"))
        real, ours = (self._thumbnails(images) for images in ([e.image for e in examples], made))
        return "thumbnail_frechet_distance", frechet_distance(real, ours)

    def _thumbnails(self, images: Sequence[Any]) -> Any:
        from torch.nn.functional import adaptive_avg_pool2d

        parts = (adaptive_avg_pool2d(self.prepare(part), 4).flatten(1) for part in in_batches(images, BATCH))
        return [row for part in parts for row in part.double().numpy()]


def _faces() -> Path:
    return carried(BUILT_IN, "gan_face_generate", "weights.tar", "gan-face-generate==1.1.1")


def _grey(outputs: Any) -> Any:
    """The network's numbers on [-1, 1] as grey levels `(n, height, width, channels)`, float64 on [0, 255]."""
    return outputs.double().clamp(-1, 1).add(1).mul(127.5).permute(0, 2, 3, 1).cpu().numpy()


def _square(image: Any) -> Any:
    """One image uint8 `(height, width, channels)` as float `(1, channels, 64, 64)` on [-1, 1]."""
    from torch.nn.functional import interpolate

    pixels = image.permute(2, 0, 1)[None].float()
    height, width = pixels.shape[2:]
    scale = SIZE / min(height, width)
    size = max(SIZE, round(height * scale)), max(SIZE, round(width * scale))
    if (height, width) != size:
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    return pixels[..., top : top + SIZE, left : left + SIZE] / 127.5 - 1

"""The 64x64 DCGAN generator (Radford et al. 2015): random, given weights, or `gan-faces`.

`gan-faces` is trained on the rendered faces of DigiFace1M. Weights hold the generator alone; a training begins with
a new discriminator. Latents are standard normal, as in most later work; those of the paper are uniform.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import LlmqError, UserError, did_you_mean
from llmq.files import sha256_files, sha256_text
from llmq.together import Share
from llmq.types import Loaded, Split
from llmq.vision.family import Batch, ImageModel, Learner, Training, in_batches
from llmq.vision.hub import carried
from llmq.vision.images import Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.predictors import Predictor

BUILT_IN = "gan-faces"
BATCH = 64  # images at a time
SIZE = 64  # pixels of a side


class Dcgan(ImageModel):
    kind: ClassVar[str] = "gan"
    suite: ClassVar[str] = "gan"
    shapes: ClassVar[frozenset[str]] = frozenset({"image", "image/label"})
    training: ClassVar[Training] = Training(
        BATCH, 2e-4, "nats", optim="adam", betas=(0.5, 0.999), autocast=True, channels_last=True
    )
    watched_from: ClassVar[int] = 2

    latent_size: PositiveInt = Field(100, description="numbers that an image is made of")
    features: PositiveInt = Field(64, description="channels of the widest layer before the image; 128 in the paper")
    channels: PositiveInt = Field(3, description="1 for grey images, 3 for colour")

    def check(self) -> None:
        if self.weights == BUILT_IN:
            _faces()
            return
        try:
            super().check()
        except UserError as error:
            raise UserError(f"{error}{did_you_mean(str(self.weights), [BUILT_IN])}") from None

    def source(self) -> str:
        if self.weights != BUILT_IN:
            return super().source()
        return f"{BUILT_IN}: gan_face_generate 1.1.1, {sha256_files([_faces()])[:16]}"

    def network(self) -> "Module":
        from llmq.models.dcgan.networks import Generator

        return Generator(self.latent_size, self.features, self.channels)

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        if self.weights != BUILT_IN:
            return super().pretrained()
        from llmq.vision.state import read_pickle

        state = read_pickle(_faces()).get("netG_state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{BUILT_IN!r}: {str(_faces())!r} holds no 'netG_state_dict'; install its package again")
        return state

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Real images on [-1, 1] for the discriminator: the shorter side scaled to 64 pixels, the middle cut out."""
        import torch

        return torch.cat([_square(torch.from_numpy(image.copy())) for image in images])

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        examples = split.train or split.held_out
        if examples and (has := examples[0].image.shape[2]) != self.channels:
            raise UserError(
                f"{self.word}: {examples[0].name!r} has {has} channels, and this generator makes {self.channels}; "
                f"set model.channels to {has}, or read the images with {self.channels}"
            )

    def learners(self, network: "Module") -> list[Learner]:
        """The discriminator, which is new and drawn under torch's seed, then the generator. They learn in turn."""
        import torch

        from llmq.models.dcgan.networks import Discriminator, discriminator_loss, generator_loss

        discriminator = Discriminator(self.features, self.channels)

        def tells(batch: Batch) -> "Tensor":
            with torch.no_grad():  # the generator does not learn here
                made = network(batch["latents"])
            return discriminator_loss(discriminator, batch["images"], made)

        def fools(batch: Batch) -> "Tensor":
            return generator_loss(discriminator, network(batch["latents"]))

        return [Learner("discriminator", discriminator, tells), Learner("generator", network, fools)]

    def batch(self, examples: Sequence[Example], rng: "Generator", augment: str, crop: int | None) -> Batch:
        """Real images and as many latents. Images are not cropped: the generator learns the place of a face, too."""
        import torch

        if crop is not None:
            raise UserError(f"crop {crop}: a generator learns from whole images; leave it out")
        images = self.prepare([example.image for example in examples])
        if augment != "none":
            flipped = torch.from_numpy(rng.random(len(images)) < 0.5)
            images[flipped] = images[flipped].flip(-1)  # left and right
        latents = rng.standard_normal((len(images), self.latent_size, 1, 1), dtype="float32")
        return {"images": images, "latents": torch.from_numpy(latents)}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The Fréchet distance of samples from held-out images, both shrunk to 4x4 pixels: rough, but fast."""
        from torch.nn.functional import adaptive_avg_pool2d

        from llmq.matrix.gaussians import frechet_distance

        def thumbnails(images: "Sequence[ndarray]") -> "list[ndarray]":
            parts = (adaptive_avg_pool2d(self.prepare(part), 4).flatten(1) for part in in_batches(images, BATCH))
            return [row for part in parts for row in part.double().numpy()]  # (channels * 16,) each

        made = self.generate(loaded, self.latents(len(examples), 0, "validation"))
        real = [example.image for example in examples]
        return "thumbnail_frechet_distance", frechet_distance(thumbnails(real), thumbnails(made))

    def example(self, batch_size: int) -> "Tensor":
        return self.latents(batch_size, 0, "example")

    def calibration(self, split: Split | None, samples: int, seed: int) -> "Iterator[Tensor]":
        """Latents, one at a time. Raises `UserError` for data: a generator is calibrated on noise."""
        if split is not None:
            raise UserError(f"{self.word} draws latents to calibrate on; leave 'data' out")
        yield from self.latents(samples, seed, "calibration").split(1)  # type: ignore[no-untyped-call]

    def latents(self, n: int, seed: int, purpose: str = "samples") -> "Tensor":
        """Standard normal latents `(n, latent_size, 1, 1)`, different for each purpose."""
        import torch

        generator = torch.Generator().manual_seed(int(sha256_text(purpose, str(seed))[:15], 16))
        return torch.randn(n, self.latent_size, 1, 1, generator=generator)

    def pictures(
        self, loaded: Loaded, split: Split | None, n: int, seed: int, share: Share
    ) -> "Iterator[tuple[int, list[ndarray]]]":
        """The images that a stage makes of `n` latents, the same for every stage: grey levels, float64 on [0, 255].

        Those of a share of the batches, each with its number.
        """
        for i, part in share.of(enumerate(self.latents(n, seed).split(BATCH))):  # type: ignore[no-untyped-call]
            yield i, list(self._made(loaded, part))

    def generate(self, loaded: Loaded, latents: "Tensor") -> "list[ndarray]":
        """One uint8 image `(64, 64, channels)` a latent. Raises `LlmqError` for numbers that are not finite."""
        import numpy as np

        made = list(self._made(loaded, latents))
        if not all(np.isfinite(image).all() for image in made):
            raise LlmqError(f"{self.word}: the generator makes values that are not finite numbers")
        return [image.round().astype("uint8") for image in made]

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.generating import Generating

        return Generating

    def framed(self, images: "Sequence[ndarray]") -> "list[ndarray]":
        """Real images as the generator would have to make them, uint8 `(64, 64, channels)`."""
        parts = (_grey(self.prepare(part)) for part in in_batches(images, BATCH))
        return [grey.round().astype("uint8") for part in parts for grey in part]

    def _made(self, loaded: Loaded, latents: "Tensor") -> "Iterator[ndarray]":
        import torch

        for part in latents.split(BATCH):  # type: ignore[no-untyped-call]
            with torch.inference_mode():
                made = loaded.module(part.to(loaded.device))  # (n, channels, 64, 64)
            yield from _grey(made)


def _faces() -> Path:
    return carried(BUILT_IN, "gan_face_generate", "weights.tar", "gan-face-generate==1.1.1")


def _grey(outputs: "Tensor") -> "ndarray":
    """The network's outputs on [-1, 1] as grey levels `(n, height, width, channels)`, float64 on [0, 255]."""
    return outputs.double().clamp(-1, 1).add(1).mul(127.5).permute(0, 2, 3, 1).cpu().numpy()


def _square(image: "Tensor") -> "Tensor":
    """Turn one uint8 image `(height, width, channels)` into floats `(1, channels, 64, 64)` on [-1, 1]."""
    from torch.nn.functional import interpolate

    pixels = image.permute(2, 0, 1)[None].float()  # (1, channels, height, width)
    height, width = pixels.shape[2:]
    scale = SIZE / min(height, width)
    size = max(SIZE, round(height * scale)), max(SIZE, round(width * scale))
    if (height, width) != size:
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    return pixels[..., top : top + SIZE, left : left + SIZE] / 127.5 - 1

"""The DCGAN generator (Radford et al. 2015) of 64x64 or 128x128 pixels: random, given weights, or `gan-faces`.

`gan-faces` is trained on the rendered faces of DigiFace1M. Weights hold the generator alone; a training begins with
a new discriminator. Latents are standard normal, as in most later work; those of the paper are uniform.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError, did_you_mean
from llmq.files import sha256_files
from llmq.types import Loaded
from llmq.vision.family import Batch, Learner, Training, in_batches
from llmq.vision.generator import BATCH, Generator
from llmq.vision.hub import carried
from llmq.vision.images import Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator as RandomNumbers
    from torch import Tensor
    from torch.nn import Module

BUILT_IN = "gan-faces"


class Dcgan(Generator):
    training: ClassVar[Training] = Training(
        BATCH, 2e-4, "nats", optim="adam", betas=(0.5, 0.999), autocast=True, channels_last=True
    )
    watched_from: ClassVar[int] = 2

    latent_size: PositiveInt = Field(100, description="numbers that an image is made of")
    features: PositiveInt = Field(64, description="channels of the widest layer before the image; 128 in the paper")
    size: Literal[64, 128] = Field(64, description="pixels of a side; 128 has one more layer, of twice the channels")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.latent_size, 1, 1

    @property
    def sides(self) -> tuple[int, int]:
        return self.size, self.size

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

        return Generator(self.latent_size, self.features, self.channels, self.size)

    def pretrained(self) -> "Mapping[str, Tensor] | None":
        if self.weights != BUILT_IN:
            return super().pretrained()
        from llmq.vision.state import read_pickle

        state = read_pickle(_faces()).get("netG_state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{BUILT_IN!r}: {str(_faces())!r} holds no 'netG_state_dict'; install its package again")
        return state

    def learners(self, network: "Module") -> list[Learner]:
        """The discriminator, which is new and drawn under torch's seed, then the generator. They learn in turn."""
        import torch

        from llmq.models.dcgan.networks import Discriminator, discriminator_loss, generator_loss

        discriminator = Discriminator(self.features, self.channels, self.size)

        def tells(batch: Batch) -> "Tensor":
            with torch.no_grad():  # the generator does not learn here
                made = network(batch["latents"])
            return discriminator_loss(discriminator, batch["images"], made)

        def fools(batch: Batch) -> "Tensor":
            return generator_loss(discriminator, network(batch["latents"]))

        return [Learner("discriminator", discriminator, tells), Learner("generator", network, fools)]

    def batch(self, examples: Sequence[Example], rng: "RandomNumbers", augment: str, crop: int | None) -> Batch:
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


def _faces() -> Path:
    return carried(BUILT_IN, "gan_face_generate", "weights.tar", "gan-face-generate==1.1.1")

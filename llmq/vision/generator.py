"""The base of the families of generators: latents become images, grey levels are made outside of the network."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import LlmqError, UserError
from llmq.files import sha256_text
from llmq.together import Share
from llmq.types import Loaded, Split
from llmq.vision.family import ImageModel, in_batches

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Generator as RandomNumbers
    from torch import Tensor

    from llmq.predictors import Predictor

BATCH = 64  # images at a time


class Generator(ImageModel):
    """A family of generators. It defines `latent_shape`, `sides` and, unless outputs lie on [-1, 1], `grey`."""

    kind: ClassVar[str] = "gan"
    suite: ClassVar[str] = "gan"
    shapes: ClassVar[frozenset[str]] = frozenset({"image", "image/label"})

    channels: PositiveInt = Field(3, description="1 for grey images, 3 for colour")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        raise NotImplementedError

    @property
    def sides(self) -> tuple[int, int] | None:
        """The rows and columns of an image; None before the graph of somebody else was seen."""
        raise NotImplementedError

    def grey(self, outputs: "Tensor") -> "Tensor":
        """The network's outputs `(n, channels, height, width)` as grey levels, float64 on [0, 255], in RGB."""
        return outputs.double().clamp(-1, 1).add(1).mul(127.5)

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Real images on [-1, 1]: scaled until they cover an image that the generator makes, the middle cut out."""
        import torch

        assert self.sides
        return torch.cat([_framed(torch.from_numpy(image.copy()), *self.sides) for image in images]) / 127.5 - 1

    def framed(self, images: "Sequence[ndarray]") -> "list[ndarray]":
        """Real images as the generator would have to make them, uint8 `(height, width, channels)`."""
        parts = (self.prepare(part).double().add(1).mul(127.5) for part in in_batches(images, BATCH))
        return [image.round().astype("uint8") for part in parts for image in _rows(part)]

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        examples = split.train or split.held_out
        if examples and (has := examples[0].image.shape[2]) != self.channels:
            raise UserError(
                f"{self.word}: {examples[0].name!r} has {has} channels, and this generator makes {self.channels}; "
                f"set model.channels to {has}, or read the images with {self.channels}"
            )

    def example(self, batch_size: int) -> "Tensor":
        return self.latents(batch_size, 0, "example")

    def calibration(self, split: Split | None, samples: int, seed: int) -> "Iterator[Tensor]":
        """Latents, one at a time. Raises `UserError` for data: a generator is calibrated on noise."""
        if split is not None:
            raise UserError(f"{self.word} draws latents to calibrate on; leave 'data' out")
        yield from self.latents(samples, seed, "calibration").split(1)  # type: ignore[no-untyped-call]

    def latents(self, n: int, seed: int, purpose: str = "samples") -> "Tensor":
        """Standard normal latents `(n, …)`, different for each purpose."""
        import torch

        return torch.randn(n, *self.latent_shape, generator=drawing(seed, purpose))

    def pictures(
        self, loaded: Loaded, split: Split | None, n: int, seed: int, share: Share
    ) -> "Iterator[tuple[int, list[ndarray]]]":
        """The images that a stage makes of `n` latents, the same for every stage: grey levels, float64 on [0, 255].

        Those of a share of the batches, each with its number.
        """
        for i, part in share.of(enumerate(self.latents(n, seed).split(BATCH))):  # type: ignore[no-untyped-call]
            yield i, list(self._made(loaded, part))

    def generate(self, loaded: Loaded, latents: "Tensor") -> "list[ndarray]":
        """One uint8 image `(height, width, channels)` a latent. Raises `LlmqError` for numbers that are not finite."""
        import numpy as np

        made = list(self._made(loaded, latents))
        if not all(np.isfinite(image).all() for image in made):
            raise LlmqError(f"{self.word}: the generator makes values that are not finite numbers")
        return [image.round().astype("uint8") for image in made]

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.generating import Generating

        return Generating

    def _made(self, loaded: Loaded, latents: "Tensor") -> "Iterator[ndarray]":
        import torch

        for part in latents.split(BATCH):  # type: ignore[no-untyped-call]
            with torch.inference_mode():
                made = loaded.module(part.to(loaded.device))  # (n, channels, height, width)
            yield from _rows(self.grey(made))


def drawing(seed: int, purpose: str) -> "RandomNumbers":
    """The generator of random numbers for a purpose under a seed."""
    import torch

    return torch.Generator().manual_seed(int(sha256_text(purpose, str(seed))[:15], 16))


def _rows(images: "Tensor") -> "ndarray":
    """Images `(n, channels, height, width)` as `(n, height, width, channels)`."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def _framed(image: "Tensor", rows: int, columns: int) -> "Tensor":
    """One uint8 image `(height, width, channels)` as floats `(1, channels, rows, columns)` on [0, 255]."""
    from torch.nn.functional import interpolate

    pixels = image.permute(2, 0, 1)[None].float()  # (1, channels, height, width)
    height, width = pixels.shape[2:]
    scale = max(rows / height, columns / width)
    size = max(rows, round(height * scale)), max(columns, round(width * scale))
    if (height, width) != size:
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    return pixels[..., top : top + rows, left : left + columns]

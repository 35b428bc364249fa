"""The base of the super-resolution networks: pairs of images as tensors, the loss, and images of any size."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.types import Loaded, Split
from llmq.vision.family import Batch, ImageModel, Learner, Training, varied
from llmq.vision.images import Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.predictors import Predictor

CROP = 24  # low-resolution pixels: patches of 96 at x4, as SRGAN and WDSR have them
VALIDATED = 8  # images, of a side of at most
VALIDATED_SIDE = 64  # low-resolution pixels; all of a large slice at every look would be half of the training


class SuperResolution(ImageModel):
    """A network that maps a low-resolution image to one `scale` times as large. A family defines its `reach` as well.

    Input and output are floats on [0, 1], `(n, channels, height, width)`; the output is not clipped.
    """

    kind: ClassVar[str] = "super-resolution"
    suite: ClassVar[str] = "rock-sr"
    shapes: ClassVar[frozenset[str]] = frozenset({"low/high"})
    training: ClassVar[Training] = Training(
        batch_size=16,
        learning_rate=1e-4,
        loss_unit="L1 on [0, 1]",
        optim="adam",
        augment="dihedral",
        autocast=True,  # 1.7 times as many examples a second on a processor with AVX-512 BF16, to the same PSNR
        channels_last=True,
    )
    any_size: ClassVar[bool] = True

    scale: Literal[2, 3, 4] = 4
    channels: Literal[1, 3] = 1
    tile: PositiveInt = Field(256, description="low-resolution pixels; larger images are made in tiles of this side")
    overlap: int | None = Field(
        None, ge=0, description="pixels that a tile sees of its neighbours; if unset all that can reach it: no seams"
    )

    @property
    def cropped(self) -> int | None:
        return CROP

    @property
    def reach(self) -> int:
        """The largest distance at which the input can change an output, in low-resolution pixels."""
        raise NotImplementedError

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Turn images of one size, uint8 or float32 on [0, 1], into floats on [0, 1]; grey fills all channels."""
        import numpy as np
        import torch

        stacked = np.stack(images)  # (n, height, width, channels)
        if stacked.shape[3] == 1:
            stacked = np.repeat(stacked, self.channels, axis=3)
        if stacked.shape[3] != self.channels:
            raise UserError(f"an image has {stacked.shape[3]} channels and the network {self.channels}")
        inputs = torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
        return inputs if stacked.dtype == np.float32 else inputs.float() / 255

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        for pair in (*split.train[:1], *split.held_out[:1]):
            (low, wide, channels), (high, wider, _) = pair.image.shape, pair.high.shape
            if (high, wider) != (self.scale * low, self.scale * wide):
                size = f"{low} x {wide} to {high} x {wider}"
                raise UserError(f"{pair.name} is {size}: not scale {self.scale} of {self.word}")
            if channels not in (1, self.channels):
                raise UserError(f"{pair.name} has {channels} channels; set channels: {channels} of {self.word}")

    def learners(self, network: "Module") -> list[Learner]:
        def loss(batch: Batch) -> "Tensor":
            distance: Tensor = (network(batch["low"]).float() - batch["high"]).abs()  # (n, channels, height, width)
            return distance.mean()

        return [Learner("l1", network, loss)]

    def batch(self, examples: Sequence[Example], rng: "Generator", augment: str, crop: int | None) -> Batch:
        """Random squares of `crop` low-resolution pixels and their high-resolution partners."""
        side = min(crop or CROP, *(min(e.image.shape[:2]) for e in examples))  # as every image allows
        pairs = [varied([e.drawn(rng), e.high], rng, augment, side) for e in examples]
        return {"low": self.prepare([low for low, _ in pairs]), "high": self.prepare([high for _, high in pairs])}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The mean PSNR of the middles of the first images, in dB."""
        from llmq.vision.degrade import to_uint8
        from llmq.vision.image_quality import capped_psnr

        scores = []
        for pair in examples[:VALIDATED]:
            low, high = _middle(pair, VALIDATED_SIDE, self.scale)
            scores.append(capped_psnr(to_uint8(self.upscale(loaded, low)), high, 255))
        return "psnr", sum(scores) / len(scores)

    def example(self, batch_size: int) -> "Tensor":
        """Images of 48 x 48 pixels: smoothed noise on [0, 1]."""
        import torch

        noise = torch.rand(batch_size, self.channels, 54, 54, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.avg_pool2d(noise, 7, stride=1)  # 54 - 6 = 48

    def upscale(self, loaded: Loaded, low: "ndarray") -> "ndarray":
        """Enlarge an image of any size, uint8 or float32 on [0, 1]; the result is grey levels, float64, not clipped."""
        import numpy as np

        height, width, channels = low.shape
        high: ndarray = np.empty((height * self.scale, width * self.scale, channels))
        for place, made in self.enlarged(loaded, low):
            high[place] = made
        return high

    def enlarged(self, loaded: Loaded, low: "ndarray") -> "Iterator[tuple[Window, ndarray]]":
        """The parts of an enlarged image, each with its place: grey levels `(height, width, channels)`, not clipped.

        An image larger than `tile` is made in tiles, each with `overlap` pixels of the surroundings, which are cut off
        again. An image with fewer channels than the network gets the mean over the network's channels.
        """
        import torch

        height, width, channels = low.shape
        overlap = self.reach if self.overlap is None else self.overlap
        for seen, kept, place in _tiles(height, width, self.tile, overlap, self.scale):
            inputs = self.prepare([low[seen]]).to(loaded.device)  # (1, channels, height, width)
            with torch.inference_mode():
                made = loaded.module(inputs)[0].float().cpu().numpy().transpose(1, 2, 0)[kept]
            yield place, 255.0 * (made.mean(2, keepdims=True) if channels < made.shape[2] else made)

    def tile_count(self, low: "ndarray") -> int:
        """The number of parts that `enlarged` makes of an image."""
        height, width = (int(size) for size in low.shape[:2])
        return math.ceil(height / self.tile) * math.ceil(width / self.tile)

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.upscaling import Upscaling

        return Upscaling

    def pictures(self, loaded: Loaded, split: Split | None, n: int, seed: int) -> "Iterator[ndarray]":
        """The images that a stage makes of the first `n` held-out ones: grey levels, float64 on [0, 255].

        Raises `UserError` without data, or for data that does not fit.
        """
        if split is None:
            raise UserError(f"{self.word} needs 'data' to make images of")
        self.check_split(split)
        return (self.upscale(loaded, pair.image).clip(0, 255) for pair in split.held_out[:n])


Window = tuple[slice, ...]


def _tiles(height: int, width: int, tile: int, overlap: int, scale: int) -> Iterator[tuple[Window, Window, Window]]:
    """For each tile: the window of the low image, the part of the result to keep, and the place in the high image."""

    def cut(begin: int, size: int) -> tuple[slice, slice, slice]:
        end = min(begin + tile, size)
        first, last = max(0, begin - overlap), min(size, end + overlap)
        kept = slice((begin - first) * scale, (end - first) * scale)  # without the surroundings
        return slice(first, last), kept, slice(begin * scale, end * scale)

    for top in range(0, height, tile):
        for left in range(0, width, tile):
            seen, kept, place = zip(cut(top, height), cut(left, width), strict=True)
            yield seen, kept, place


def _middle(pair: Example, side: int, scale: int) -> "tuple[ndarray, ndarray]":
    top, left = (max(0, (size - side) // 2) for size in pair.image.shape[:2])
    high = pair.high[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    return pair.image[top : top + side, left : left + side], high

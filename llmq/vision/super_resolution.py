"""The base of the super-resolution networks: pairs of images as tensors, the loss, and images of any size."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.together import Share
from llmq.types import Loaded, Split
from llmq.vision.family import Batch, ImageModel, Learner, Training, the_shape, varied
from llmq.vision.images import VOLUMES, Example

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.random import Generator
    from torch import Tensor
    from torch.nn import Module

    from llmq.predictors import Predictor

CROP = 24  # low-resolution pixels: patches of 96 at x4, as SRGAN and WDSR have them
CUBE = 12  # of volumes
TILE, TILE_OF_VOLUMES = 256, 48  # low-resolution pixels
VALIDATED = 8  # images, of a side of at most
VALIDATED_CUBE = 24  # of a side of a volume
VALIDATED_SIDE = 64  # low-resolution pixels; all of a large slice at every look would be half of the training


class SuperResolution(ImageModel):
    """A network that maps a low-resolution image to one `scale` times as large. A family defines its `reach` as well.

    Input and output are floats on [0, 1], `(n, channels, [depth, ]height, width)`; the output is not clipped.
    """

    kind: ClassVar[str] = "super-resolution"
    suite: ClassVar[str] = "rock-sr"
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
    tile_of_graphs: ClassVar[int] = TILE
    """The side of the tiles of an exported stage, which sees `reach` pixels more on each side."""

    scale: Literal[2, 3, 4] = 4
    channels: Literal[1, 3] = 1
    tile: PositiveInt | None = Field(
        None,
        description="low-resolution pixels; larger images are made in tiles of this side; 256, of volumes 48, "
        "of an exported EDSR 512",
    )
    overlap: int | None = Field(
        None, ge=0, description="pixels that a tile sees of its neighbours; if unset all that can reach it: no seams"
    )

    @property
    def volumetric(self) -> bool:
        """True for a network of volumes."""
        return False

    @property
    def cropped(self) -> int | None:
        return CUBE if self.volumetric else CROP

    def tile_of(self, loaded: Loaded) -> int:
        """The side of the tiles that a stage makes, in low-resolution pixels."""
        plain = TILE if loaded.artifact.runtime == "torch" else self.tile_of_graphs
        return self.tile or (TILE_OF_VOLUMES if self.volumetric else plain)

    @property
    def reach(self) -> int:
        """The largest distance at which the input can change an output, in low-resolution pixels."""
        raise NotImplementedError

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Turn images of one size, uint8 or float32 on [0, 1], into floats on [0, 1]; grey fills all channels."""
        import numpy as np
        import torch

        stacked = np.stack(images)  # (n, [depth, ]height, width, channels)
        if stacked.shape[-1] == 1:
            stacked = np.repeat(stacked, self.channels, axis=-1)
        if stacked.shape[-1] != self.channels:
            raise UserError(f"an image has {stacked.shape[-1]} channels and the network {self.channels}")
        inputs = torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 1)))
        return inputs if stacked.dtype == np.float32 else inputs.float() / 255

    def check_images(self, split: Split) -> None:
        the_shape(split, VOLUMES if self.volumetric else "low/high", self.word)

    def check_split(self, split: Split) -> None:
        self.check_images(split)
        for pair in (*split.train[:1], *split.held_out[:1]):
            *low, channels = pair.image.shape
            high = pair.high.shape[:-1]
            if high != tuple(self.scale * side for side in low):
                size = " to ".join(" x ".join(map(str, sides)) for sides in (low, high))
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
        side = min(crop or self.cropped or CROP, *(min(e.image.shape[:-1]) for e in examples))  # as every image allows
        vary = varied_volumes if self.volumetric else varied
        pairs = [vary([e.drawn(rng), e.high], rng, augment, side) for e in examples]
        return {"low": self.prepare([low for low, _ in pairs]), "high": self.prepare([high for _, high in pairs])}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """The mean PSNR of the middles of the first images, in dB."""
        from llmq.vision.degrade import to_uint8
        from llmq.vision.image_quality import capped_psnr

        scores = []
        for pair in examples[:VALIDATED]:
            low, high = _middle(pair, VALIDATED_CUBE if self.volumetric else VALIDATED_SIDE, self.scale)
            scores.append(capped_psnr(to_uint8(self.upscale(loaded, low)), high, 255))
        return "psnr", sum(scores) / len(scores)

    def example(self, batch_size: int) -> "Tensor":
        """Images of 48 x 48 pixels, or volumes of 16³: smoothed noise on [0, 1]."""
        import torch

        if self.volumetric:
            cubes = torch.rand(batch_size, self.channels, 22, 22, 22, generator=torch.Generator().manual_seed(0))
            return torch.nn.functional.avg_pool3d(cubes, 7, stride=1)
        noise = torch.rand(batch_size, self.channels, 54, 54, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.avg_pool2d(noise, 7, stride=1)  # 54 - 6 = 48

    def upscale(self, loaded: Loaded, low: "ndarray") -> "ndarray":
        """Enlarge an image of any size, uint8 or float32 on [0, 1]; the result is grey levels, float64, not clipped."""
        import numpy as np

        high: ndarray = np.empty((*(side * self.scale for side in low.shape[:-1]), low.shape[-1]))
        for place, made in self.enlarged(loaded, low):
            high[place] = made
        return high

    def enlarged(self, loaded: Loaded, low: "ndarray") -> "Iterator[tuple[Window, ndarray]]":
        """The parts of an enlarged image or volume, each with its place: grey levels `(…, channels)`, not clipped.

        A larger image is made in tiles (`tile_of`), each with `overlap` pixels of the surroundings, which are cut off
        again. An image with fewer channels than the network gets the mean over the network's channels.
        """
        import numpy as np
        import torch

        *sides, channels = low.shape
        overlap = self.reach if self.overlap is None else self.overlap
        for seen, kept, place in _tiles(sides, self.tile_of(loaded), overlap, self.scale):
            inputs = self.prepare([low[seen]]).to(loaded.device)  # (1, channels, [depth, ]height, width)
            with torch.inference_mode():
                made = np.moveaxis(loaded.module(inputs)[0].float().cpu().numpy(), 0, -1)[kept]
            yield place, 255.0 * (made.mean(-1, keepdims=True) if channels < made.shape[-1] else made)

    def tile_count(self, loaded: Loaded, low: "ndarray") -> int:
        """The number of parts that `enlarged` makes of an image."""
        return math.prod(math.ceil(int(side) / self.tile_of(loaded)) for side in low.shape[:-1])

    def predictor(self) -> "type[Predictor]":
        from llmq.vision.upscaling import Upscaling

        return Upscaling

    def pictures(
        self, loaded: Loaded, split: Split | None, n: int, seed: int, share: Share
    ) -> "Iterator[tuple[int, list[ndarray]]]":
        """The images that a stage makes of the first held-out ones, `n` at least: grey levels, float64 on [0, 255].

        Those of a share of the held-out images or volumes, each with its number. Raises `UserError` without data, or
        for data that does not fit.
        """
        if split is None:
            raise UserError(f"{self.word} needs 'data' to make images of")
        self.check_split(split)
        for i, pair in share.of(enumerate(self._first(split, n))):
            made = self.upscale(loaded, pair.image).clip(0, 255)
            yield i, list(made) if self.volumetric else [made]

    def _first(self, split: Split, n: int) -> "Iterator[Example]":
        """The first held-out examples of which `n` images are made; a volume gives one for each of its slices."""
        for pair in split.held_out:
            if n <= 0:
                return
            yield pair
            n -= len(pair.image) * self.scale if self.volumetric else 1


Window = tuple[slice, ...]


def _tiles(sides: Sequence[int], tile: int, overlap: int, scale: int) -> Iterator[tuple[Window, Window, Window]]:
    """For each tile: the window of the low image, the part of the result to keep, and the place in the high image."""

    def cut(begin: int, size: int) -> tuple[slice, slice, slice]:
        end = min(begin + tile, size)
        first, last = max(0, begin - overlap), min(size, end + overlap)
        kept = slice((begin - first) * scale, (end - first) * scale)  # without the surroundings
        return slice(first, last), kept, slice(begin * scale, end * scale)

    for begins in itertools.product(*(range(0, side, tile) for side in sides)):
        seen, kept, place = zip(*(cut(begin, side) for begin, side in zip(begins, sides, strict=True)), strict=True)
        yield seen, kept, place


def varied_volumes(volumes: "Sequence[ndarray]", rng: "Generator", augment: str, side: int | None) -> "list[ndarray]":
    """The same random cube of each volume `(z, y, x, channels)`, mirrored along axes that `augment` allows.

    `flip` mirrors along any axis, `dihedral` exchanges axes as well: all 48 ways of a cube.
    """
    import numpy as np

    sides = volumes[0].shape[:-1]
    side = side or min(sides)
    begins = [int(rng.integers(0, length - side + 1)) for length in sides]
    mirrored = [augment != "none" and rng.random() < 0.5 for _ in sides]
    axes = [*(rng.permutation(3) if augment == "dihedral" else range(3)), 3]
    cubes = []
    for volume in volumes:
        k = volume.shape[0] // sides[0]  # 1, and the scale of a high-resolution volume
        cube = volume[tuple(slice(begin * k, (begin + side) * k) for begin in begins)]
        cube = cube[tuple(slice(None, None, -1 if mirror else 1) for mirror in mirrored)]
        cubes.append(np.ascontiguousarray(cube.transpose(axes)))
    return cubes


def _middle(pair: Example, side: int, scale: int) -> "tuple[ndarray, ndarray]":
    begins = [max(0, (size - side) // 2) for size in pair.image.shape[:-1]]
    low, high = (tuple(slice(begin * k, (begin + side) * k) for begin in begins) for k in (1, scale))
    return pair.image[low], pair.high[high]

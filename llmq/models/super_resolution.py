"""What the super-resolution networks share: pairs of images as tensors, the loss, and images of any size."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.data.images import Example
from llmq.errors import UserError
from llmq.models.vision import Learning, Player, Vision
from llmq.types import Loaded, Split

CROP = 24  # low-resolution pixels: patches of 96 at x4, as SRGAN and WDSR have them
VALIDATED = 8  # images, of a side of at most
VALIDATED_SIDE = 64  # low-resolution pixels; all of a large slice at every look would be half of the training


class SuperResolution(Vision):
    """A network that maps a low-resolution image to one `scale` times as large.

    Its input and output are floats on [0, 1], `(n, channels, height, width)`, the output not clipped.
    """

    kind: ClassVar[str] = "super-resolution"
    suite: ClassVar[str] = "rock-sr"
    learning: ClassVar[Learning] = Learning(
        learning_rate=1e-4,
        batch_size=16,
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
    def reach(self) -> int:
        """How many low-resolution pixels away the input can still change an output."""
        raise NotImplementedError

    def prepare(self, images: Sequence[Any]) -> Any:
        """Images uint8 of one size as floats on [0, 1]; a grey one fills all channels."""
        import numpy as np
        import torch

        stacked = np.stack(images)
        if stacked.shape[3] == 1:
            stacked = np.repeat(stacked, self.channels, axis=3)
        if stacked.shape[3] != self.channels:
            raise UserError(f"an image has {stacked.shape[3]} channels and the network {self.channels}")
        return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))).float() / 255

    def example(self, batch_size: int) -> Any:
        """Images of 48 x 48, smoothed noise on [0, 1]."""
        import torch

        noise = torch.rand(batch_size, self.channels, 54, 54, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.avg_pool2d(noise, 7, stride=1)

    def check_split(self, split: Split) -> None:
        """Raise `UserError` for data that is not pairs of this scale and these channels."""
        word = type(self).__module__.rpartition(".")[2]
        if split.shape != "low/high":
            raise UserError(f"{word} needs low/high pairs such as data.rock has, and this data is {split.shape}")
        for pair in (*split.train[:1], *split.held_out[:1]):
            (low, wide, channels), (high, wider, _) = pair.image.shape, pair.high.shape
            if (high, wider) != (self.scale * low, self.scale * wide):
                raise UserError(f"{pair.name} is {low} x {wide} to {high} x {wider}: not scale {self.scale} of {word}")
            if channels not in (1, self.channels):
                raise UserError(f"{pair.name} has {channels} channels; set channels: {channels} of {word}")

    def players(self, network: Any) -> list[Player]:
        """The network alone, which lowers the mean absolute difference."""
        return [Player("l1", network, partial(_l1, network))]

    def batch(self, examples: Sequence[Example], rng: Any, augment: str, crop: int | None) -> dict[str, Any]:
        """Random squares of `crop` low-resolution pixels and their high-resolution partners."""
        side = min(crop or CROP, *(min(e.image.shape[:2]) for e in examples))
        pairs = [_patch(e, side, self.scale, rng, augment) for e in examples]
        return {"low": self.prepare([low for low, _ in pairs]), "high": self.prepare([high for _, high in pairs])}

    def validate_on(self, loaded: Loaded, examples: Sequence[Example]) -> tuple[str, float]:
        """Mean PSNR of the middles of the first images, in dB."""
        from llmq.data.degrade import to_uint8
        from llmq.tasks.image_quality import capped_psnr

        scores = []
        for pair in examples[:VALIDATED]:
            low, high = _middle(pair, VALIDATED_SIDE, self.scale)
            scores.append(capped_psnr(to_uint8(self.upscale(loaded, low)), high, 255))
        return "psnr", sum(scores) / len(scores)

    def upscale(self, loaded: Loaded, low: Any) -> Any:
        """The high-resolution image of a uint8 one, in grey levels, float64, unclipped; `low` may be of any size.

        A larger image than `tile` is made in tiles, each with `overlap` pixels of its surroundings, which are cut off
        again. Of an image with fewer channels than the network the mean over the channels is given.
        """
        import numpy as np
        import torch

        height, width, channels = low.shape
        high = np.empty((height * self.scale, width * self.scale, channels))
        for seen, kept, place in _tiles(height, width, self.tile, self._overlap, self.scale):
            inputs = self.prepare([low[seen]]).to(loaded.device)
            with torch.inference_mode():
                made = loaded.module(inputs)[0].float().cpu().numpy().transpose(1, 2, 0)[kept]
            high[place] = 255.0 * (made.mean(2, keepdims=True) if channels < made.shape[2] else made)
        return high

    def pictures(self, loaded: Loaded, split: Split | None, n: int, seed: int) -> Iterator[Any]:
        """What a stage makes of the first `n` held-out images: grey levels, float64 on [0, 255].

        Raises `UserError` without data, or where it does not fit.
        """
        if split is None:
            raise UserError(f"{type(self).__module__.rpartition('.')[2]} needs 'data' to make images of")
        self.check_split(split)
        return (self.upscale(loaded, pair.image).clip(0, 255) for pair in split.held_out[:n])

    @property
    def _overlap(self) -> int:
        return self.reach if self.overlap is None else self.overlap


Window = tuple[slice, slice]


def _tiles(height: int, width: int, tile: int, overlap: int, scale: int) -> Iterator[tuple[Window, Window, Window]]:
    """What a tile sees of the low image, what of its result is kept, and where in the high image that goes."""
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            rows, columns = _cut(top, height, tile, overlap, scale), _cut(left, width, tile, overlap, scale)
            yield (rows[0], columns[0]), (rows[1], columns[1]), (rows[2], columns[2])


def _cut(begin: int, size: int, tile: int, overlap: int, scale: int) -> tuple[slice, slice, slice]:
    end = min(begin + tile, size)
    first, last = max(0, begin - overlap), min(size, end + overlap)
    kept = slice((begin - first) * scale, (end - first) * scale)
    return slice(first, last), kept, slice(begin * scale, end * scale)


def _l1(network: Any, batch: Mapping[str, Any]) -> Any:
    return (network(batch["low"]).float() - batch["high"]).abs().mean()


def _patch(pair: Example, side: int, scale: int, rng: Any, augment: str) -> tuple[Any, Any]:
    """A random square of a pair; mirrored (`flip`), or mirrored and turned (`dihedral`), both alike."""
    top, left = (int(rng.integers(0, size - side + 1)) for size in pair.image.shape[:2])
    low = pair.image[top : top + side, left : left + side]
    high = pair.high[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    mirror = augment != "none" and rng.random() < 0.5
    turns = int(rng.integers(0, 4)) if augment == "dihedral" else 0
    return _turned(low, mirror, turns), _turned(high, mirror, turns)


def _turned(image: Any, mirror: bool, turns: int) -> Any:
    import numpy as np

    return np.rot90(image[:, ::-1] if mirror else image, turns)


def _middle(pair: Example, side: int, scale: int) -> tuple[Any, Any]:
    top, left = (max(0, (size - side) // 2) for size in pair.image.shape[:2])
    high = pair.high[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    return pair.image[top : top + side, left : left + side], high

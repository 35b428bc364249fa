"""Held-out pairs of images, with the low-resolution image enlarged by a network and by bicubic interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llmq import together
from llmq.errors import LlmqError, UserError
from llmq.vision.family import check_same

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.artifact import Artifact
    from llmq.types import Data, Loaded, Split
    from llmq.vision.images import Example
    from llmq.vision.super_resolution import SuperResolution

PROTOCOL = "images clipped to [0, 255] and rounded to 8 bits as a file holds them"


@dataclass(frozen=True)
class Upscaled:
    """One scene as uint8 images: `low`, and `truth`, `bicubic` and `model`, which are larger by the scale."""

    name: str
    low: ndarray  # (height, width, channels)
    truth: ndarray  # (height * scale, width * scale, channels), as the next two
    bicubic: ndarray
    model: ndarray
    pixel_size: float | None = None
    """Micrometres that a pixel of the larger images is wide; None if unknown."""


def held_out_pairs(artifact: Artifact[SuperResolution], split: Split, limit: int | None) -> Sequence[Example]:
    """The first `limit` held-out pairs. Raises `UserError` for data that does not fit the network."""
    artifact.model.check_split(split)
    pairs = split.held_out[:limit]
    if not len(pairs):
        raise UserError("its data has nothing held out to measure on")
    return pairs


def in_stretches(split: Split, n: int, of: str = "slices", least: int = 1) -> tuple[tuple[int, ...] | None, str]:
    """The clusters of `n` held-out slices that are neighbours in a volume, and the words for them; else None and "".

    Blocks of a volume are neighbours as its slices are. A cluster has `least` of them or more.
    """
    from llmq.statistics.figures import stretches

    if not split.neighbours:
        return None, ""
    joined = stretches(max(1, n // least))
    clusters = tuple(joined[min(i // least, len(joined) - 1)] for i in range(n))
    return clusters, f"; standard error over {len(set(clusters))} stretches of neighbouring {of}"


def upscaled(loaded: Loaded[SuperResolution], data: Data, limit: int | None) -> list[Upscaled]:
    """The first `limit` held-out pairs, upscaled. Raises `UserError` for data that does not fit the network."""
    scenes = []
    split = data.read()
    pairs = held_out_pairs(loaded.artifact, split, limit)
    for pair, made in zip(pairs, all_enlarged(loaded, data, limit), strict=True):
        for name, low, (truth, simple, output) in slices(pair.name, pair.image, pair.high, *made):
            scenes.append(Upscaled(name, low, truth, simple, output, split.pixel_size))
    return scenes


def all_enlarged(loaded: Loaded[SuperResolution], data: Data, limit: int | None) -> list[tuple[ndarray, ndarray]]:
    """Each of the first `limit` held-out images, `enlarged`; the processes of a run share the images."""
    return together.answers_of(partial(_share_of_enlarged, data, data.read().sha256, limit), [loaded])


def _share_of_enlarged(
    data: Data, sha256: str, limit: int | None, models: Sequence[Loaded[SuperResolution]], share: together.Share
) -> dict[int, tuple[ndarray, ndarray]]:
    (loaded,) = models
    split = data.read()
    check_same(split, sha256, data.word)
    examples = split.held_out[:limit]
    return {i: enlarged(loaded, examples[i]) for i in share.of(range(len(examples)))}


def slices(name: str, low: ndarray, *high: ndarray) -> Iterator[tuple[str, ndarray, list[ndarray]]]:
    """The name and the images as they are, or of volumes each slice across z, with the low one at the same depth."""
    if low.ndim == 3:
        yield name, low, list(high)
        return
    for z in range(len(high[0])):
        yield f"{name} z {z}", low[z * len(low) // len(high[0])], [volume[z] for volume in high]


def enlarged(loaded: Loaded[SuperResolution], example: Example) -> tuple[ndarray, ndarray]:
    """The image enlarged by bicubic interpolation and by the network, both uint8."""
    import numpy as np

    from llmq.vision.degrade import bicubic, to_uint8

    model = loaded.artifact.model
    made = model.upscale(loaded, example.image)
    if not np.isfinite(made).all():  # bytes would hide a NaN
        raise LlmqError(f"{example.name}: the network makes an image of numbers that are not finite")
    return to_uint8(bicubic(example.image, model.scale)), to_uint8(made)

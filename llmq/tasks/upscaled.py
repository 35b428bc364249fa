"""Held-out pairs of images with what a network and bicubic interpolation make of the low-resolution one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.artifact import Artifact
from llmq.data.images import Example
from llmq.errors import LlmqError, UserError
from llmq.types import Loaded, Measurement, Samples, Split

PROTOCOL = "images clipped to [0, 255] and rounded to 8 bits as a file holds them"


@dataclass(frozen=True)
class Upscaled:
    """One scene, uint8 `(height, width, channels)` each: `low`, and `truth`, `bicubic` and `model` at its size."""

    name: str
    low: Any
    truth: Any
    bicubic: Any
    model: Any


def upscaled(loaded: Loaded, split: Split, limit: int | None) -> list[Upscaled]:
    """The first `limit` held-out pairs, upscaled. Raises `UserError` for data that does not fit the network."""
    return list(_each(loaded, held_out_pairs(loaded.artifact, split, limit)))


def held_out_pairs(artifact: Artifact, split: Split, limit: int | None) -> Sequence[Example]:
    """The first `limit` held-out pairs. Raises `UserError` for data that does not fit the network."""
    model: Any = artifact.model
    model.check_split(split)
    pairs = split.held_out[:limit]
    if not len(pairs):
        raise UserError("its data has nothing held out to measure on")
    return pairs


def _each(loaded: Loaded, pairs: Sequence[Example]) -> Iterator[Upscaled]:
    import numpy as np

    from llmq.data.degrade import bicubic, to_uint8

    model: Any = loaded.artifact.model
    for pair in pairs:
        made = model.upscale(loaded, pair.image)
        if not np.isfinite(made).all():
            raise LlmqError(f"{pair.name}: what the network makes of it are no finite numbers")
        yield Upscaled(pair.name, pair.image, pair.high, to_uint8(bicubic(pair.image, model.scale)), to_uint8(made))


def mean_of(task: str, metric: str, values: Sequence[float], unit: str, better: Any, convention: str) -> Measurement:
    """The mean of one value an image."""
    from llmq.statistics import ratio_stderr

    mean, stderr = ratio_stderr(values)
    samples = Samples(tuple(values))
    return Measurement(task, metric, mean, unit, better, len(values), stderr, convention, samples)

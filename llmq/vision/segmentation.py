"""Grey images cut into pores and solid, by Otsu's threshold, the outermost of several, or a stated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.errors import UserError
from llmq.plugin import DataWord, data_of_run
from llmq.types import Task
from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.sketch import Sketch, Work

Method = Literal["otsu", "multi_otsu", "fixed"]


@dataclass(frozen=True)
class Segmentation:
    """The way to a threshold, and the side of it on which pores lie."""

    method: Method = "otsu"
    threshold: int | None = None  # of `fixed`
    phases: int = 3  # of `multi_otsu`
    pores: Literal["dark", "bright"] = "dark"

    def check(self) -> None:
        """Raise `UserError` for a threshold without `fixed`, or `fixed` without one."""
        if (self.method == "fixed") != (self.threshold is not None):
            raise UserError(f"segmentation {self.method} and threshold {self.threshold}: fixed needs one, others none")

    def level(self, images: Sequence[ndarray]) -> int | None:
        """The threshold of uint8 images, one for all; None where they have fewer grey levels than phases."""
        if self.method == "fixed":
            return self.threshold
        levels = otsu(images, self.phases if self.method == "multi_otsu" else 2)
        return None if levels is None else levels[0 if self.pores == "dark" else -1]

    def cut(self, image: ndarray, level: int | None) -> ndarray:
        """The pores of an image, boolean; without a threshold there are none."""
        import numpy as np

        dark: ndarray = image <= level if level is not None else np.full(image.shape, self.pores == "bright")
        return dark if self.pores == "dark" else ~dark

    @property
    def told(self) -> str:
        """The convention in words."""
        side = "grey level up to" if self.pores == "dark" else "grey level above"
        of_many = f"the {'lowest' if self.pores == 'dark' else 'highest'} of Otsu's {self.phases - 1} thresholds"
        by = {"otsu": "Otsu's threshold", "multi_otsu": of_many, "fixed": f"{self.threshold}"}[self.method]
        return f"pore: {side} {by}"


class OfPores(Task[SuperResolution]):
    """A task that looks at the pores of enlarged slices."""

    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = data_of_run("rock")
    segmentation: Method = Field("otsu", description="Otsu's threshold, the outermost of several, or a fixed one")
    threshold: int | None = Field(
        None, ge=0, le=254, description="of fixed: the grey level up to which pixels are dark"
    )
    phases: int = Field(3, ge=3, le=5, description="of multi_otsu")
    pores: Literal["dark", "bright"] = "dark"
    limit: PositiveInt | None = Field(None, description="slices, or volumes, at most")
    pictures: int = Field(1, ge=0, description="slices shown")

    def check(self) -> None:
        super().check()
        self.way.check()

    @property
    def way(self) -> Segmentation:
        """The way to the pores that the settings ask for."""
        return Segmentation(self.segmentation, self.threshold, self.phases, self.pores)

    def foresee(self, stage: Sketch) -> Work:
        """Passes over the held-out slices, one at a time."""
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected(), self.limit, 1)


def otsu(images: Sequence[ndarray], phases: int = 2) -> list[int] | None:
    """Otsu's thresholds of uint8 images: grey levels up to the first are the darkest of the `phases`.

    The thresholds maximise the variance between the phases over one histogram of all images (Otsu 1979, by
    scikit-image). None where the images have fewer grey levels than phases.
    """
    import numpy as np
    from skimage.filters import threshold_multiotsu, threshold_otsu

    counts = np.sum([np.bincount(np.ravel(image), minlength=256) for image in images], axis=0).astype(np.float64)
    present = np.flatnonzero(counts)
    if len(present) < phases:
        return None
    levels = np.arange(present[0], present[-1] + 1)  # scikit-image divides by the empty counts beyond
    histogram = counts[levels], levels
    if phases == 2:
        return [int(threshold_otsu(hist=histogram))]
    return [int(level) for level in threshold_multiotsu(hist=histogram, classes=phases)]

"""PSNR and SSIM of a stage's images against the base's images of the same inputs or latents.

`frechet` and `super_resolution` measure the quality of either.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field, PositiveInt

from llmq import together
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.plugin import DataWord, build
from llmq.types import Data, Exhibit, Loaded, Measurement, Task

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.sketch import Sketch, Work


class Fidelity(Task):
    suits: ClassVar[frozenset[str]] = frozenset({"gan", "super-resolution"})
    in_every_process: ClassVar[bool] = True

    data: DataWord | None = Field(
        None, description="its held-out images are the input, the run's if unset; a gan draws latents"
    )
    n: PositiveInt = Field(64, description="inputs, or latents")
    seed: int = Field(0, ge=0, lt=2**32, description="of the latents")
    shown: int = Field(8, ge=0, description="images to look at")

    def unset_data(self, kind: str) -> Mapping[str, Data]:
        """A gan draws latents; a super-resolution network reads the run's images."""
        asks = kind == "super-resolution" and "data" not in self.model_fields_set
        return {"data": cast(Data, build("rock", "data"))} if asks else {}

    def check_base(self, base: Artifact) -> None:
        model: Any = base.model
        if self.data:
            model.check_split(self.data.read())

    def score(self, loaded: Loaded) -> Iterable[Exhibit]:
        """The first images, to look at."""
        if images := list(
            chain.from_iterable(made for _, made in self._pictures(loaded, self.shown, together.Share()))
        )[: self.shown]:
            yield Exhibit(self.name, "Images made", "", self._inputs(), picture=_grid([images], [""]))

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over the inputs that are shown."""
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected() if self.data else None, self.shown or 1, 1, self.shown)

    def foresee_against(self, stage: "Sketch", base: "Sketch") -> "Work":
        """Passes over the inputs by the stage and by the base."""
        from llmq.vision.sizing import asked, beside

        ours, theirs = (
            asked(one, self.data.expected() if self.data else None, self.n, 1, self.n) for one in (stage, base)
        )
        return beside(ours, theirs)

    def against(self, loaded: Loaded, base: Loaded) -> Iterable[Measurement | Exhibit]:
        """PSNR and SSIM, and base, stage and their difference one above the other."""
        from llmq.statistics.figures import mean
        from llmq.vision.image_quality import MOST, SSIM_PROTOCOL
        from llmq.vision.upscaled import in_stretches

        of_batches = together.answers_of(partial(_share_of_pairs, self), [loaded, base])
        compared = list(chain.from_iterable(of_batches))[: self.n]
        near, alike = [one.psnr for one in compared], [one.ssim for one in compared]
        pairs = [one.pair for one in compared[: self.shown] if one.pair]
        if not near:
            raise UserError(f"{self._inputs()}: there are none")
        clusters, words = in_stretches(self.data.read(), len(near)) if self.data else (None, "")
        between = f"stage against base on {self._inputs()}, mean of {len(near)} images, floats before rounding{words}"
        range_ = "data range 255, all channels"
        psnr = f"PSNR, {range_}, at most {MOST:g} an image; {between}"
        yield mean(self.name, "psnr", near, "dB", "higher", psnr, clusters=clusters)
        ssims = f"SSIM, {range_}, {SSIM_PROTOCOL}; {between}"
        yield mean(self.name, "ssim", alike, "", "higher", ssims, clusters=clusters)
        if pairs:
            picture = _grid(list(zip(*pairs, strict=True)), ["base", "stage"])
            yield Exhibit(self.name, "Base and stage", "", self._inputs(), picture=picture)

    def _pictures(self, loaded: Loaded, n: int, share: together.Share) -> "Iterator[tuple[int, list[ndarray]]]":
        model: Any = loaded.artifact.model
        for i, made in model.pictures(loaded, self.data.read() if self.data else None, n, self.seed, share):
            if not all(isfinite(float(image.sum())) for image in made):  # NaN would pass for the largest PSNR
                raise LlmqError("the stage makes values that are not finite numbers")
            yield i, made

    def _inputs(self) -> str:
        return f"held-out images of {self.data.word}" if self.data else f"the same latents, seed {self.seed}"


@dataclass(frozen=True)
class _Compared:
    """An image of a stage beside the base's."""

    psnr: float
    ssim: float
    pair: "tuple[ndarray, ndarray] | None"
    """The images of base and stage, if they are among the first of their batch, which may be shown."""


def _share_of_pairs(task: Fidelity, models: Sequence[Loaded], share: together.Share) -> dict[int, list[_Compared]]:
    """The images in a share of the batches, or of the held-out images, compared."""
    from llmq.vision.image_quality import SMALLEST, capped_psnr, ssim

    found: dict[int, list[_Compared]] = {}
    for (i, ours), (_, theirs) in zip(*(task._pictures(one, task.n, share) for one in models), strict=True):
        found[i] = []
        for place, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            if min(own.shape[:2]) < SMALLEST:
                raise UserError(f"SSIM needs {SMALLEST} pixels on a side, and an image is {own.shape[:2]}")
            pair = (other, own) if i + place < task.shown else None
            found[i].append(_Compared(capped_psnr(own, other, 255), ssim(own, other, 255), pair))
    return found


def _grid(rows: "Sequence[Sequence[ndarray]]", names: Sequence[str]) -> bytes:
    """Rows of images as PNG; below two rows their absolute differences, on one scale."""
    import numpy as np

    from llmq.vision.pictures import panels, png, show, show_differences

    two = len(rows) == 2
    figure, axes = panels(len(rows) + two, len(rows[0]), 1.0, 1.05)
    for line, images, name in zip(axes, rows, names, strict=False):
        for panel, image in zip(line, images, strict=True):
            show(panel, np.clip(image, 0, 255).round().astype(np.uint8))
        line[0].set_ylabel(name, fontsize=8.5)
    if two:
        differences = [np.abs(a - b).mean(2) for a, b in zip(*rows, strict=True)]  # (height, width) each
        show_differences(figure, axes[-1], differences, [""] * len(differences))
        axes[-1][0].set_ylabel("difference", fontsize=8.5)
    return png(figure)

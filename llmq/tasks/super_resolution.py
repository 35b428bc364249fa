"""PSNR and SSIM of held-out images against the truth, bicubic's on the same images, and the gain in dB.

Images of one grey level, and others that bicubic interpolation makes without any error, are left out: they tell nothing
of a network's sharpness, and bicubic's PSNR is infinite.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord, data_of_run
from llmq.types import Exhibit, Loaded, Measurement, Task
from llmq.vision import super_resolution as family

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.sketch import Sketch, Work
    from llmq.vision.upscaled import Upscaled

SSIM_SIDE = 11  # pixels; a window of SSIM

SCORING = 150_000_000
"""Bytes that scores and pictures take, about."""


class SuperResolution(Task[family.SuperResolution]):
    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})
    in_every_process: ClassVar[bool] = True

    data: DataWord = data_of_run("rock")
    channel: Literal["all", "y"] = Field("all", description="of colour images: every channel, or Y of YCbCr (BT.601)")
    border: int | None = Field(None, ge=0, description="pixels cut off on each side before scoring; the scale if unset")
    limit: PositiveInt | None = Field(None, description="images at most")
    pictures: int = Field(2, ge=0, description="images shown")
    view: PositiveInt = Field(96, description="pixels of the square shown: where bicubic errs most")

    def check_base(self, base: Artifact[family.SuperResolution]) -> None:
        """Raise `UserError` for pairs of another scale than the network's, or too small for SSIM within the border."""
        from llmq.vision.upscaled import held_out_pairs

        border = self._border(base.model)
        for pair in held_out_pairs(base, self.data.read(), self.limit):
            if min(pair.high.shape[-3:-1]) - 2 * border < SSIM_SIDE:
                raise UserError(f"{pair.name}: {pair.high.shape[-3:-1]} less a border of {border} is under {SSIM_SIDE}")

    def _border(self, model: family.SuperResolution) -> int:
        return model.scale if self.border is None else self.border

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over the held-out images, one at a time."""
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected(), self.limit, 1, scoring=SCORING)

    def score(self, loaded: Loaded[family.SuperResolution]) -> Iterable[Measurement | Exhibit]:
        import numpy as np

        from llmq.vision.image_quality import luma, without_border
        from llmq.vision.upscaled import PROTOCOL, in_stretches, upscaled

        model = loaded.artifact.model
        split = self.data.read()
        self.check_base(loaded.artifact)
        scenes = upscaled(loaded, self.data, self.limit)
        border = self._border(model)

        def scored(image: "ndarray") -> "ndarray":
            return without_border(luma(image) if self.channel == "y" else image, border)

        def tells(truth: "ndarray", simple: "ndarray") -> bool:
            return bool(np.ptp(truth) != 0 and (truth != simple).any())

        channel = "Y of YCbCr (BT.601)" if self.channel == "y" else "all channels"
        protocol = (
            f"x{model.scale}, data range 255, {channel}, {border}-pixel border cropped, mean over images; {PROTOCOL}; "
            f"{self.data.word} held out, sha256 {split.sha256[:12]}"
        )
        told = [scene for scene in scenes if tells(scored(scene.truth), scored(scene.bicubic))]
        if not told:
            raise UserError(
                f"all {len(scenes)} held-out images of {self.data.word} are flat, or made by bicubic "
                "interpolation without any error; name others"
            )
        if flat := len(scenes) - len(told):
            protocol += f"; {flat} flat image{'s' if flat > 1 else ''} left out"
        clusters, words = in_stretches(split, len(told))
        yield from self._figures(told, scored, protocol + words, clusters)
        for scene in scenes[: self.pictures]:
            yield from self._shown(scene, model.scale)

    def _figures(
        self,
        scenes: Sequence["Upscaled"],
        scored: "Callable[[ndarray], ndarray]",
        protocol: str,
        clusters: tuple[int, ...] | None,
    ) -> Iterator[Measurement]:
        from llmq.statistics import figures
        from llmq.vision.image_quality import MOST, SSIM_PROTOCOL, capped_psnr, ssim

        mean = partial(figures.mean, clusters=clusters)
        psnr = f"PSNR, at most {MOST:g} dB an image, {protocol}"
        psnrs = {}
        for prefix, kind, note in (("", "model", ""), ("bicubic_", "bicubic", "; bicubic: a = -0.5")):
            pairs = [(scored(getattr(scene, kind)), scored(scene.truth)) for scene in scenes]
            psnrs[kind] = [capped_psnr(*pair, 255) for pair in pairs]
            ssims = [ssim(*pair, 255) for pair in pairs]
            yield mean(self.name, f"{prefix}psnr", psnrs[kind], "dB", "higher", psnr + note)
            yield mean(self.name, f"{prefix}ssim", ssims, "", "higher", f"SSIM, {SSIM_PROTOCOL}, {protocol}{note}")
        gains = [own - simple for own, simple in zip(psnrs["model"], psnrs["bicubic"], strict=True)]
        yield mean(self.name, "psnr_gain", gains, "dB", "higher", f"{psnr}; the network's less bicubic's")

    def _shown(self, scene: "Upscaled", scale: int) -> Iterator[Exhibit]:
        """The place where bicubic errs most: all views with their differences, and three of them to slide between."""
        from llmq.vision.image_quality import psnr
        from llmq.vision.scale_bar import label

        height, width = scene.low.shape[:2]
        made = f"PSNR {psnr(scene.model, scene.truth, 255):.2f} dB; bicubic {psnr(scene.bicubic, scene.truth, 255):.2f}"
        window = _worst(_difference(scene.bicubic, scene), self.view, scale)
        picture = _picture(scene, window, scale)
        yield Exhibit(self.name, scene.name, f"{width} x {height} pixels, x{scale}", made, picture=picture)
        side = window[1].stop - window[1].start
        bar = f"bar: {label(side, scene.pixel_size)}" if scene.pixel_size else "no bar: the width of a pixel is unknown"
        strip, title = _strip(scene, window), f"{scene.name}, close up"
        yield Exhibit(self.name, title, "", bar, picture=strip, panels=("bicubic", "model", "truth"))


def _difference(image: "ndarray", scene: "Upscaled") -> "ndarray":
    """The absolute difference from the truth, the mean over channels. `(height, width)`"""
    import numpy as np

    absolute: ndarray = np.abs(image.astype(float) - scene.truth).mean(2)
    return absolute


def _strip(scene: "Upscaled", window: tuple[slice, slice]) -> bytes:
    """Bicubic, model and truth side by side, pixel by pixel, with scale bars where the size of a pixel is known."""
    import io

    import numpy as np
    from PIL import Image

    from llmq.vision.scale_bar import stamped

    views = [stamped(image[window], scene.pixel_size) for image in (scene.bicubic, scene.model, scene.truth)]
    strip = np.concatenate(views, axis=1)  # (height, 3 * width, channels)
    data = io.BytesIO()
    Image.fromarray(strip[..., 0] if strip.shape[2] == 1 else strip).save(data, "PNG")
    return data.getvalue()


def _picture(scene: "Upscaled", window: tuple[slice, slice], scale: int) -> bytes:
    """Low, bicubic, model and truth above, the differences of the two in the middle below them, on one scale.

    The scale follows bicubic's differences, so that all stages have the same scale.
    """
    import numpy as np

    from llmq.vision.pictures import panels, png, show, show_differences
    from llmq.vision.scale_bar import label, stamped

    low = tuple(slice(s.start // scale, s.stop // scale) for s in window)
    figure, axes = panels(2, 4, 1.9, 2.0)
    images = {"low": scene.low[low], "bicubic": scene.bicubic[window], "model": scene.model[window]}
    truth = stamped(scene.truth[window], scene.pixel_size)
    bar = f", bar {label(truth.shape[1], scene.pixel_size)}" if scene.pixel_size else ""
    for panel, (title, image) in zip(axes[0], {**images, f"truth{bar}": truth}.items(), strict=True):
        show(panel, image, title)
    differences = [_difference(image, scene)[window] for image in (scene.bicubic, scene.model)]
    titles = [
        f"|{name} - truth|, mean {d.mean():.1f}" for name, d in zip(("bicubic", "model"), differences, strict=True)
    ]
    top = float(np.percentile(differences[0], 99.5))
    show_differences(figure, axes[1, 1:3], differences, titles, top)
    return png(figure)


def _worst(difference: "ndarray", side: int, scale: int) -> tuple[slice, slice]:
    """The square, on whole low-resolution pixels, where the differences are greatest."""
    import numpy as np

    h, w = (min(side, size) // scale * scale for size in difference.shape)
    # (height + 1, width + 1), each the sum of all differences above and to the left: a window is four look-ups.
    sums = np.pad(difference.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = (sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w])[::scale, ::scale]
    top, left = (int(i) * scale for i in np.unravel_index(inside.argmax(), inside.shape))
    return slice(top, top + h), slice(left, left + w)

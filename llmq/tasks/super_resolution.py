"""How near an upscaled image is to the true one."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Exhibit, Loaded, Measurement, Task

if TYPE_CHECKING:
    from llmq.tasks.upscaled import Upscaled

SSIM_SIDE = 11  # pixels; a window of SSIM


class SuperResolution(Task):
    """PSNR and SSIM of held-out images against the truth, bicubic's on the same images, and the gain in dB.

    Images of one grey level, and others that bicubic interpolation makes without any error, are left out: whatever a
    network makes of them says nothing of its sharpness, and bicubic's PSNR is infinite.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})

    data: DataWord = Field(
        "rock",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    channel: Literal["all", "y"] = Field("all", description="of colour images: every channel, or Y of YCbCr (BT.601)")
    border: int | None = Field(None, ge=0, description="pixels cut off on each side before scoring; the scale if unset")
    limit: PositiveInt | None = Field(None, description="images at most")
    pictures: int = Field(2, ge=0, description="images shown")
    view: PositiveInt = Field(96, description="pixels of the square shown: where bicubic errs most")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for pairs of another scale than the network's, or too small for SSIM within the border."""
        from llmq.tasks.upscaled import held_out_pairs

        border = self._border(base.model)
        for pair in held_out_pairs(base, self.data.read(), self.limit):
            if min(pair.high.shape[:2]) - 2 * border < SSIM_SIDE:
                raise UserError(f"{pair.name}: {pair.high.shape[:2]} less a border of {border} is under {SSIM_SIDE}")

    def _border(self, model: Any) -> int:
        return int(model.scale) if self.border is None else self.border

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """Every image upscaled and scored; the first of them shown."""
        from llmq.tasks.upscaled import PROTOCOL, upscaled

        model: Any = loaded.artifact.model
        split = self.data.read()
        self.check_base(loaded.artifact)
        scenes = upscaled(loaded, split, self.limit)
        border = self._border(model)
        channel = "Y of YCbCr (BT.601)" if self.channel == "y" else "all channels"
        protocol = (
            f"x{model.scale}, data range 255, {channel}, {border}-pixel border cropped, mean over images; {PROTOCOL}; "
            f"{self.data.word} held out, sha256 {split.sha256[:12]}"
        )
        told = [scene for scene in scenes if not self._says_nothing(scene, border)]
        if not told:
            raise UserError(
                f"all {len(scenes)} held-out images of {self.data.word} are flat, or made by bicubic "
                "interpolation without any error; name others"
            )
        if flat := len(scenes) - len(told):
            protocol += f"; {flat} flat image{'s' if flat > 1 else ''} left out"
        yield from self._figures(told, border, protocol)
        for scene in scenes[: self.pictures]:
            yield self._shown(scene, model.scale)

    def _figures(self, scenes: Sequence["Upscaled"], border: int, protocol: str) -> Iterator[Measurement]:
        from llmq.tasks.image_quality import MOST, SSIM_PROTOCOL, capped_psnr, ssim
        from llmq.tasks.upscaled import mean_of

        seen = partial(self._seen, border=border)
        scores: dict[str, list[float]] = {}
        for scene in scenes:
            for prefix, image in (("", scene.model), ("bicubic_", scene.bicubic)):
                scores.setdefault(f"{prefix}psnr", []).append(capped_psnr(seen(image), seen(scene.truth), 255))
                scores.setdefault(f"{prefix}ssim", []).append(ssim(seen(image), seen(scene.truth), 255))
        gains = [own - its for own, its in zip(scores["psnr"], scores["bicubic_psnr"], strict=True)]
        for metric, values in {**scores, "psnr_gain": gains}.items():
            is_ssim = metric.endswith("ssim")
            convention = (
                f"SSIM, {SSIM_PROTOCOL}, {protocol}" if is_ssim else f"PSNR, at most {MOST:g} dB an image, {protocol}"
            )
            convention += ("; bicubic: a = -0.5" if "bicubic" in metric else "") + (
                "; the network's less bicubic's" if metric == "psnr_gain" else ""
            )
            yield mean_of(self.name, metric, values, "" if is_ssim else "dB", "higher", convention)

    def _seen(self, image: Any, border: int) -> Any:
        from llmq.tasks.image_quality import luma, without_border

        return without_border(luma(image) if self.channel == "y" else image, border)

    def _says_nothing(self, scene: "Upscaled", border: int) -> bool:
        """Whether the truth is flat or bicubic's equals it: the same images whatever the network."""
        from llmq.tasks.image_quality import is_flat

        truth, simple = self._seen(scene.truth, border), self._seen(scene.bicubic, border)
        return is_flat(truth) or bool((truth == simple).all())

    def _shown(self, scene: "Upscaled", scale: int) -> Exhibit:
        from llmq.tasks.image_quality import psnr

        height, width = scene.low.shape[:2]
        made = f"PSNR {psnr(scene.model, scene.truth, 255):.2f} dB; bicubic {psnr(scene.bicubic, scene.truth, 255):.2f}"
        picture = _picture(scene, self.view, scale)
        return Exhibit(self.name, scene.name, f"{width} x {height} pixels, x{scale}", made, picture=picture)


def _picture(scene: "Upscaled", view: int, scale: int) -> bytes:
    """Low, bicubic, model and truth above, the differences of the two in the middle below them, on one scale.

    The scale follows bicubic's differences, so that it is the same for every stage.
    """
    import numpy as np

    from llmq.tasks.pictures import panels, png, show, show_differences

    def difference(image: Any) -> Any:
        return np.abs(image.astype(float) - scene.truth).mean(2)

    window = _worst(difference(scene.bicubic), view, scale)
    low = tuple(slice(s.start // scale, s.stop // scale) for s in window)
    figure, axes = panels(2, 4, 1.9, 2.0)
    images = {"low": scene.low[low], "bicubic": scene.bicubic[window], "model": scene.model[window]}
    for panel, (title, image) in zip(axes[0], {**images, "truth": scene.truth[window]}.items(), strict=True):
        show(panel, image, title)
    differences = [difference(image)[window] for image in (scene.bicubic, scene.model)]
    titles = [
        f"|{name} - truth|, mean {d.mean():.1f}" for name, d in zip(("bicubic", "model"), differences, strict=True)
    ]
    top = float(np.percentile(differences[0], 99.5))
    show_differences(figure, axes[1, 1:3], differences, titles, top)
    return png(figure)


def _worst(difference: Any, side: int, scale: int) -> tuple[slice, slice]:
    """The square, on whole low-resolution pixels, where the differences are greatest."""
    import numpy as np

    sides = [min(side, size) // scale * scale for size in difference.shape]
    sums = np.pad(difference.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = sides
    inside = (sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w])[::scale, ::scale]
    top, left = (int(i) * scale for i in np.unravel_index(inside.argmax(), inside.shape))
    return slice(top, top + h), slice(left, left + w)

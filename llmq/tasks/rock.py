"""Pores against the true ones after Otsu segmentation, of the network's images and of bicubic ones.

Share of pixels of the same phase, intersection over union of the pores, porosity beside the true one, and error of the
two-point correlation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord, data_of_run
from llmq.types import Exhibit, Loaded, Measurement, Task
from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.sketch import Sketch, Work
    from llmq.vision.upscaled import Upscaled

KINDS = ("truth", "bicubic", "model")


class Rock(Task[SuperResolution]):
    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})

    data: DataWord = data_of_run("rock")
    distance: PositiveInt = Field(32, description="pixels up to which two points are correlated")
    limit: PositiveInt | None = Field(None, description="slices at most")
    pictures: int = Field(1, ge=0, description="slices shown")

    def check_base(self, base: Artifact[SuperResolution]) -> None:
        """Raise `UserError` for pairs of another scale than the network's, or no larger than the `distance`."""
        from llmq.vision.upscaled import held_out_pairs

        for pair in held_out_pairs(base, self.data.read(), self.limit):
            if min(pair.high.shape[:2]) <= self.distance:
                raise UserError(f"{pair.name}: {pair.high.shape[:2]} is no larger than distance {self.distance}")

    def foresee(self, stage: "Sketch") -> "Work":
        """Passes over the held-out slices, one at a time."""
        from llmq.vision.sizing import asked

        return asked(stage, self.data.expected(), self.limit, 1)

    def score(self, loaded: Loaded[SuperResolution]) -> Iterable[Measurement | Exhibit]:
        from llmq.statistics.figures import mean
        from llmq.vision.image_quality import luma
        from llmq.vision.upscaled import PROTOCOL, upscaled

        split = self.data.read()
        self.check_base(loaded.artifact)
        scenes = upscaled(loaded, split, self.limit)
        grey: dict[str, list[ndarray]] = {
            kind: [luma(getattr(s, kind)).round().astype("uint8") for s in scenes] for kind in KINDS
        }
        levels = {kind: otsu(images) for kind, images in grey.items()}
        if levels["truth"] is None:
            raise UserError(f"all held-out pixels of {self.data.word} are alike, and nothing tells pores")
        # Images that are all of one grey level have no pores.
        pores = {k: [image <= (-1 if (level := levels[k]) is None else level) for image in grey[k]] for k in KINDS}
        protocol = (
            f"pore: grey level up to Otsu's threshold over all slices, that of each of {', '.join(KINDS)} its own; "
            f"{PROTOCOL}; {self.data.word} held out, sha256 {split.sha256[:12]}"
        )
        for kind, prefix in (("model", ""), ("bicubic", "bicubic_")):
            yield from self._figures(prefix, pores[kind], pores["truth"], protocol)
        for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
            shares = [float(image.mean()) for image in pores[kind]]
            convention = f"mean over slices of the share of pores; {protocol}"
            yield mean(self.name, f"{prefix}porosity", shares, "share", "unknown", convention)
        # The thresholds are no part of the convention, as they are outcomes themselves.
        for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
            if (level := levels[kind]) is not None:
                metric, n = f"{prefix}otsu_threshold", len(scenes)
                yield Measurement(self.name, metric, float(level), "grey level", "unknown", n, None, protocol)
        for i, scene in enumerate(scenes[: self.pictures]):
            yield self._shown(scene, {kind: pores[kind][i] for kind in KINDS})

    def _figures(
        self, prefix: str, pores: "Sequence[ndarray]", truth: "Sequence[ndarray]", protocol: str
    ) -> Iterator[Measurement]:
        from llmq.statistics.figures import mean, ratio

        pairs = list(zip(pores, truth, strict=True))  # boolean (height, width) each
        agreement = [float((p == t).mean()) for p, t in pairs]
        yield mean(self.name, f"{prefix}pixel_agreement", agreement, "share", "higher", protocol)
        shared, either = [float((p & t).sum()) for p, t in pairs], [float((p | t).sum()) for p, t in pairs]
        if not sum(either):
            raise UserError("no slice has a pore to compare")
        convention = f"pores of both over pores of either, pixels of all slices added up; {protocol}"
        yield ratio(self.name, f"{prefix}pore_iou", shared, either, "share", "higher", convention)
        porosity = [abs(float(p.mean()) - float(t.mean())) for p, t in pairs]
        convention = f"mean over slices of the absolute difference of the shares of pores; {protocol}"
        yield mean(self.name, f"{prefix}porosity_error", porosity, "share", "lower", convention)
        errors = [float(abs(two_point(p, self.distance) - two_point(t, self.distance)).mean()) for p, t in pairs]
        convention = (
            f"mean absolute difference of the chance that two points 1 to {self.distance} pixels apart, along rows and "
            f"columns, are both pore; {protocol}"
        )
        yield mean(self.name, f"{prefix}two_point_error", errors, "probability", "lower", convention)

    def _shown(self, scene: "Upscaled", pores: "Mapping[str, ndarray]") -> Exhibit:
        shares = {kind: f"{100 * pores[kind].mean():.1f} %" for kind in KINDS}
        made = f"porosity {shares['model']}; bicubic {shares['bicubic']}"
        picture = _picture(scene, pores, self.distance)
        return Exhibit(
            self.name,
            scene.name,
            "blue: a pore that is none; orange: a pore that was missed",
            made,
            f"porosity {shares['truth']}",
            picture,
        )


def _picture(scene: "Upscaled", pores: "Mapping[str, ndarray]", distance: int) -> bytes:
    """The true slice, where bicubic and model err (blue: a pore that is none; orange: missed), and the correlations."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from llmq.vision.pictures import panels, png, show
    from llmq.vision.scale_bar import label, stamped

    figure, axes = panels(1, 4, 2.2, 2.3)
    bar = f", bar {label(scene.truth.shape[1], scene.pixel_size)}" if scene.pixel_size else ""
    show(axes[0, 0], stamped(scene.truth, scene.pixel_size), f"truth{bar}")
    for panel, kind in zip(axes[0, 1:3], ("bicubic", "model"), strict=True):
        drawn = np.where(pores["truth"][..., None], np.uint8(70), np.uint8(225)).repeat(3, 2)  # (height, width, 3)
        drawn[pores[kind] & ~pores["truth"]] = (47, 111, 222)
        drawn[~pores[kind] & pores["truth"]] = (217, 130, 43)
        wrong = (pores[kind] != pores["truth"]).mean()
        show(panel, drawn, f"{kind}: {100 * wrong:.1f} % wrong")
    curves = axes[0, 3]
    for kind, style in zip(KINDS, ("k-", "C1--", "C0-"), strict=True):
        curves.plot(range(1, distance + 1), two_point(pores[kind], distance), style, lw=1.3, label=kind)
    curves.set_title("two-point correlation", fontsize=8.5)
    curves.spines[["left", "bottom"]].set_visible(True)
    for axis in (curves.xaxis, curves.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    curves.tick_params(labelsize=7)
    curves.legend(frameon=False, fontsize=7.5)
    return png(figure)


def otsu(images: "Sequence[ndarray]") -> int | None:
    """Otsu's threshold of uint8 images (Otsu 1979): pixels up to this grey level are pore.

    The threshold maximises the variance between the classes over one histogram of all images; of equals, the lowest.
    None where all pixels are of one grey level.
    """
    import numpy as np

    counts = np.sum([np.bincount(np.ravel(image), minlength=256) for image in images], axis=0).astype(np.float64)
    if np.count_nonzero(counts) < 2:
        return None
    below, levels = counts.cumsum(), np.arange(256)  # (256,): pixels up to each level
    mass = (counts * levels).cumsum()
    above = below[-1] - below  # (256,): pixels beyond each level
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2  # (256,), by threshold
    return int(np.nan_to_num(between, nan=-1.0).argmax())


def two_point(pores: "ndarray", distance: int) -> "ndarray":
    """The chance that two points 1, 2, … `distance` pixels apart are both pore, the mean of rows and columns.

    Only pairs within the image count; `pores` is boolean `(height, width)` and longer than `distance`.
    """
    import numpy as np

    chances = np.empty(distance)
    for r in range(1, distance + 1):
        down, right = pores[r:] & pores[:-r], pores[:, r:] & pores[:, :-r]
        chances[r - 1] = (down.mean() + right.mean()) / 2
    return chances

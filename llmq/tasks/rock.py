"""What images of rock are for: their pores, after segmentation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.types import Exhibit, Loaded, Measurement, Samples, Task

if TYPE_CHECKING:
    from llmq.tasks.upscaled import Upscaled

KINDS = ("truth", "bicubic", "model")


class Rock(Task):
    """Pores against the true ones after Otsu segmentation, by the network and by bicubic.

    Share of pixels of the same phase, intersection over union of the pores, error of the porosity, and of the
    two-point correlation.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})

    data: DataWord = Field(
        "rock",
        validate_default=True,
        description="what the run trains on, else calibrates on, if unset; where it does neither, this",
    )
    distance: PositiveInt = Field(32, description="pixels up to which two points are correlated")
    limit: PositiveInt | None = Field(None, description="slices at most")
    pictures: int = Field(1, ge=0, description="slices shown")

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for pairs of another scale than the network's, or no larger than the `distance`."""
        from llmq.tasks.upscaled import held_out_pairs

        for pair in held_out_pairs(base, self.data.read(), self.limit):
            if min(pair.high.shape[:2]) <= self.distance:
                raise UserError(f"{pair.name}: {pair.high.shape[:2]} is no larger than distance {self.distance}")

    def score(self, loaded: Loaded) -> Iterable[Measurement | Exhibit]:
        """Every slice upscaled, segmented and compared; the first of them shown."""
        from llmq.tasks.image_quality import luma
        from llmq.tasks.segmentation import otsu
        from llmq.tasks.upscaled import PROTOCOL, upscaled

        split = self.data.read()
        self.check_base(loaded.artifact)
        scenes = upscaled(loaded, split, self.limit)
        grey = {kind: [luma(getattr(s, kind)).round().astype("uint8") for s in scenes] for kind in KINDS}
        levels = {kind: otsu(images) for kind, images in grey.items()}
        if levels["truth"] is None:
            raise UserError(f"all held-out pixels of {self.data.word} are alike, and nothing tells pores")
        # What is all of one grey level has no pores.
        pores = {k: [image <= (-1 if (level := levels[k]) is None else level) for image in grey[k]] for k in KINDS}
        protocol = (
            f"pore: grey level up to Otsu's threshold over all slices, that of each of {', '.join(KINDS)} its own; "
            f"{PROTOCOL}; {self.data.word} held out, sha256 {split.sha256[:12]}"
        )
        for kind, prefix in (("model", ""), ("bicubic", "bicubic_")):
            yield from self._figures(prefix, pores[kind], pores["truth"], protocol)
        yield from self._thresholds(levels, len(scenes), protocol)
        for i, scene in enumerate(scenes[: self.pictures]):
            yield self._shown(scene, {kind: pores[kind][i] for kind in KINDS})

    def _figures(self, prefix: str, found: Sequence[Any], truth: Sequence[Any], protocol: str) -> Iterator[Measurement]:
        from llmq.tasks.segmentation import two_point
        from llmq.tasks.upscaled import mean_of

        pairs = list(zip(found, truth, strict=True))
        agreement = [float((f == t).mean()) for f, t in pairs]
        yield mean_of(self.name, f"{prefix}pixel_agreement", agreement, "share", "higher", protocol)
        yield self._iou(prefix, pairs, protocol)
        porosity = [abs(float(f.mean()) - float(t.mean())) for f, t in pairs]
        convention = f"mean over slices of the absolute difference of the shares of pores; {protocol}"
        yield mean_of(self.name, f"{prefix}porosity_error", porosity, "share", "lower", convention)
        errors = [float(abs(two_point(f, self.distance) - two_point(t, self.distance)).mean()) for f, t in pairs]
        convention = (
            f"mean absolute difference of the chance that two points 1 to {self.distance} pixels apart, along rows and "
            f"columns, are both pore; {protocol}"
        )
        yield mean_of(self.name, f"{prefix}two_point_error", errors, "probability", "lower", convention)

    def _thresholds(self, levels: Mapping[str, int | None], n: int, protocol: str) -> Iterator[Measurement]:
        """The thresholds themselves: what came out, and so no part of how it was measured."""
        for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
            if (level := levels[kind]) is not None:
                metric = f"{prefix}otsu_threshold"
                yield Measurement(self.name, metric, float(level), "grey level", "unknown", n, None, protocol)

    def _iou(self, prefix: str, pairs: Sequence[tuple[Any, Any]], protocol: str) -> Measurement:
        from llmq.statistics import ratio_stderr

        shared, either = (tuple(float(n) for n in counts) for counts in zip(*map(_overlap, pairs), strict=True))
        if not sum(either):
            raise UserError("no slice has a pore to compare")
        value, stderr = ratio_stderr(shared, either)
        convention = f"pores of both over pores of either, pixels of all slices added up; {protocol}"
        samples = Samples(shared, either)
        n = len(pairs)
        return Measurement(self.name, f"{prefix}pore_iou", value, "share", "higher", n, stderr, convention, samples)

    def _shown(self, scene: "Upscaled", pores: Mapping[str, Any]) -> Exhibit:
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


def _overlap(pair: tuple[Any, Any]) -> tuple[int, int]:
    found, truth = pair
    return int((found & truth).sum()), int((found | truth).sum())


def _picture(scene: "Upscaled", pores: Mapping[str, Any], distance: int) -> bytes:
    """The true slice, where bicubic and model err (blue: a pore that is none; orange: missed), and the correlations."""
    import numpy as np

    from llmq.tasks.pictures import panels, png, show
    from llmq.tasks.segmentation import two_point

    figure, axes = panels(1, 4, 2.2, 2.3)
    show(axes[0, 0], scene.truth, "truth")
    for panel, kind in zip(axes[0, 1:3], ("bicubic", "model"), strict=True):
        drawn = np.where(pores["truth"][..., None], np.uint8(70), np.uint8(225)).repeat(3, 2)
        drawn[pores[kind] & ~pores["truth"]] = (47, 111, 222)
        drawn[~pores[kind] & pores["truth"]] = (217, 130, 43)
        wrong = (pores[kind] != pores["truth"]).mean()
        show(panel, drawn, f"{kind}: {100 * wrong:.1f} % wrong")
    curves = axes[0, 3]
    for kind, style in zip(KINDS, ("k-", "C1--", "C0-"), strict=True):
        curves.plot(range(1, distance + 1), two_point(pores[kind], distance), style, lw=1.3, label=kind)
    curves.set_title("two-point correlation", fontsize=8.5)
    curves.spines[["left", "bottom"]].set_visible(True)
    curves.xaxis.set_major_locator(_ticks())
    curves.yaxis.set_major_locator(_ticks())
    curves.tick_params(labelsize=7)
    curves.legend(frameon=False, fontsize=7.5)
    return png(figure)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)

"""An enlarged scan judged without truth, beside bicubic: width of edges, noise, sensitivity of pores to the threshold.

Sharp edges and little noise are wanted together, and pores that hardly change with the threshold. None of it says that
what is sharp is true: `rock` and `super_resolution` say so where there is a registered high-resolution scan.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Exhibit, Loaded, Measurement
from llmq.vision.segmentation import OfPores
from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from numpy import ndarray

KINDS = (("model", ""), ("bicubic", "bicubic_"))
REACH, SMOOTH = 3, 2
"""Low-resolution pixels from a boundary on that are flat, and the sigma of the mean that noise is told from."""


class NoReference(OfPores):
    shift: int = Field(5, ge=1, le=50, description="grey levels that the threshold is moved, up and down")

    def check_base(self, base: Artifact[SuperResolution]) -> None:
        """Raise `UserError` for a scan that has nothing to look at, or colours that the network does not take."""
        split = self.data.read()
        if not len(split.held_out):
            raise UserError(f"{self.data.word} has nothing held out to measure on")
        volumes = split.held_out[0].image.ndim == 4
        if volumes != base.model.volumetric:
            fits = [f"{3 if each else 2} dimensions" for each in (volumes, base.model.volumetric)]
            raise UserError(f"{self.data.word} is of {fits[0]}, and the network of {fits[1]}")
        channels = split.held_out[0].image.shape[-1]
        if channels not in (1, base.model.channels):
            raise UserError(f"{self.data.word} has {channels} channels, and the network {base.model.channels}")

    def score(self, loaded: Loaded[SuperResolution]) -> Iterable[Measurement | Exhibit]:
        from llmq.vision.image_quality import luma
        from llmq.vision.upscaled import PROTOCOL, all_enlarged, in_stretches, slices

        split = self.data.read()
        self.check_base(loaded.artifact)
        lows: list[tuple[str, ndarray]] = []
        grey: dict[str, list[ndarray]] = {"model": [], "bicubic": []}
        examples = split.held_out[: self.limit]
        for example, images in zip(examples, all_enlarged(loaded, self.data, self.limit), strict=True):
            for name, low, (simple, made) in slices(example.name, example.image, *images):
                lows.append((name, low))
                grey["bicubic"].append(luma(simple).round().astype("uint8"))
                grey["model"].append(luma(made).round().astype("uint8"))
        way, scale = self.way, loaded.artifact.model.scale
        levels = {kind: way.level(images) for kind, images in grey.items()}
        # Of a scan alone the low pixels have that size, of pairs the high ones.
        pixel_size = split.pixel_size and split.pixel_size / (scale if split.shape == "low" else 1)
        if levels["bicubic"] is None:
            raise UserError(f"all held-out pixels of {self.data.word} are alike, and nothing tells pores")
        clusters, alike = in_stretches(split, len(lows))
        own = "" if self.segmentation == "fixed" else " over all slices, model and bicubic each its own"
        protocol = (
            f"x{scale}; {way.told}{own}; {PROTOCOL}; {self.data.word} held out, sha256 {split.sha256[:12]}{alike}"
        )
        for kind, prefix in KINDS:
            yield from self._figures(prefix, grey[kind], levels[kind], scale, protocol, clusters)
        for i, (name, low) in enumerate(lows[: self.pictures]):
            yield self._shown(name, low, {kind: grey[kind][i] for kind in grey}, levels, pixel_size)

    def _figures(
        self,
        prefix: str,
        images: "Sequence[ndarray]",
        level: int | None,
        scale: int,
        protocol: str,
        clusters: tuple[int, ...] | None,
    ) -> Iterator[Measurement]:
        from llmq.statistics import figures
        from llmq.vision.scan_quality import edge_width, noise_power

        mean = partial(figures.mean, clusters=clusters)
        way = self.way
        pores = [way.cut(image, level) for image in images]
        shares = [float(p.mean()) for p in pores]
        yield mean(self.name, f"{prefix}porosity", shares, "share", "unknown", f"mean over slices; {protocol}")
        moved = [self._moved(image, level) for image in images]
        convention = (
            f"share of pixels that change phase as the threshold moves from {self.shift} grey levels below to "
            f"{self.shift} above, over {2 * self.shift}, mean over slices; {protocol}"
        )
        yield mean(self.name, f"{prefix}threshold_sensitivity", moved, "share/grey level", "lower", convention)
        pairs = list(zip(images, pores, strict=True))
        widths = [edge_width(image, p) for image, p in pairs]
        words = (
            "contrast of the phases' medians over the median gradient (central differences) along their boundary, 2.5 "
            "sigmas of a Gaussian edge, mean over slices"
        )
        yield from self._known(f"{prefix}edge_width", widths, "pixels", words, protocol, clusters)
        powers = [noise_power(image, p, REACH * scale, SMOOTH * scale) for image, p in pairs]
        words = (
            f"variance more than {REACH * scale} pixels from a boundary, less a Gaussian mean of sigma "
            f"{SMOOTH * scale} pixels, mean over slices"
        )
        yield from self._known(f"{prefix}noise_power", powers, "grey levels²", words, protocol, clusters)

    def _moved(self, image: "ndarray", level: int | None) -> float:
        if level is None:
            return 0.0
        below, above = (self.way.cut(image, level + by) for by in (-self.shift, self.shift))
        return float((below != above).mean()) / (2 * self.shift)

    def _known(
        self,
        metric: str,
        values: Sequence[float | None],
        unit: str,
        words: str,
        protocol: str,
        clusters: tuple[int, ...] | None,
    ) -> Iterator[Measurement]:
        """The mean of the values that slices have, if any has one."""
        from llmq.statistics.figures import mean
        from llmq.terminal import say

        told = tuple(c for c, value in zip(clusters, values, strict=True) if value is not None) if clusters else None
        known = [value for value in values if value is not None]
        if not known:
            say(f"{self.name}: no slice has what {metric} is told from: {words}")
            return
        left_out = f"; {len(values) - len(known)} slices without one left out" if len(known) < len(values) else ""
        yield mean(self.name, metric, known, unit, "lower", f"{words}{left_out}; {protocol}", clusters=told)

    def _shown(
        self,
        name: str,
        low: "ndarray",
        grey: "Mapping[str, ndarray]",
        levels: Mapping[str, int | None],
        pixel_size: float | None,
    ) -> Exhibit:
        from llmq.vision.pictures import panels, png, show, show_axes
        from llmq.vision.scale_bar import label, stamped

        figure, axes = panels(1, 4, 2.2, 2.3)
        show(axes[0, 0], low, "low")
        curves = axes[0, 3]
        for panel, kind, colour in zip(axes[0, 1:3], ("bicubic", "model"), ("C1", "C0"), strict=True):
            image = grey[kind][..., None]
            bar = f", bar {label(image.shape[1], pixel_size)}" if pixel_size else ""
            show(panel, stamped(image, pixel_size), f"{kind}{bar}")
            counts = [float(self.way.cut(grey[kind], at).mean()) for at in range(255)]
            curves.plot(range(255), counts, color=colour, lw=1.3, label=kind)
            if (level := levels[kind]) is not None:
                curves.axvline(level, color=colour, lw=0.8, ls=":")
        show_axes(curves, "porosity by threshold")
        size = f"{low.shape[1]} x {low.shape[0]} pixels"
        return Exhibit(self.name, name, size, "dotted: the threshold", picture=png(figure))

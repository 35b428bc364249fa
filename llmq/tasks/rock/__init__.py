"""Pores against the true ones after segmentation, of the network's images and of bicubic ones, in 2-D or 3-D.

Share of pixels of the same phase, intersection over union and Dice of the pores, porosity, connected porosity, Euler
number, specific surface, size of pores (local thickness) and two-point correlation, each beside the true one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Exhibit, Loaded, Measurement, Split
from llmq.vision.segmentation import OfPores
from llmq.vision.super_resolution import SuperResolution

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.vision.upscaled import Upscaled

KINDS = ("truth", "bicubic", "model")
Parts = Mapping[str, "Sequence[ndarray]"]
"""By kind, the pores of every slice or block."""


class Rock(OfPores):
    dimensions: Literal[2, 3] = Field(2, description="3: the held-out slices are one volume, measured in blocks")
    block: PositiveInt = Field(64, description="pixels of a side of a block, about; in 3-D")
    distance: PositiveInt = Field(32, description="pixels up to which two points are correlated")

    def check(self) -> None:
        super().check()
        if self.dimensions == 3 and self.block * 2 // 3 <= self.distance:  # parts are equal, and may be smaller
            raise UserError(f"blocks of {self.block} are too small for distance {self.distance}; take 1.5 times that")

    def check_base(self, base: Artifact[SuperResolution]) -> None:
        """Raise `UserError` for pairs of another scale than the network's or no larger than the `distance`.

        In 3-D the slices are those of one volume.
        """
        from llmq.vision.upscaled import held_out_pairs

        split = self.data.read()
        if self.dimensions == 3 and split.apart is None:
            raise UserError(f"the slices of {self.data.word} are no volume across one axis; take dimensions: 2")
        pairs = held_out_pairs(base, split, self.limit)
        if self.dimensions == 3 and len(pairs) == 1 and not base.model.volumetric:
            raise UserError(f"one slice of {self.data.word} is no volume; take more, or dimensions: 2")
        for pair in pairs:
            if min(pair.high.shape[-3:-1]) <= self.distance:
                raise UserError(f"{pair.name}: {pair.high.shape[-3:-1]} is no larger than distance {self.distance}")

    def score(self, loaded: Loaded[SuperResolution]) -> Iterable[Measurement | Exhibit]:
        from llmq.vision.image_quality import luma
        from llmq.vision.upscaled import PROTOCOL, upscaled

        split = self.data.read()
        self.check_base(loaded.artifact)
        scenes = upscaled(loaded, self.data, self.limit)
        grey: dict[str, list[ndarray]] = {
            kind: [luma(getattr(s, kind)).round().astype("uint8") for s in scenes] for kind in KINDS
        }
        way = self.way
        levels = {kind: way.level(images) for kind, images in grey.items()}
        if levels["truth"] is None:
            raise UserError(f"all held-out pixels of {self.data.word} are alike, and nothing tells pores")
        # Images that have fewer grey levels than phases have no pores.
        slices = {kind: [way.cut(image, levels[kind]) for image in grey[kind]] for kind in KINDS}
        parts, apart, about, clusters = self._parts(slices, split)
        own = "" if self.segmentation == "fixed" else f" over all slices, that of each of {', '.join(KINDS)} its own"
        protocol = f"{way.told}{own}{about}; {PROTOCOL}; {self.data.word} held out, sha256 {split.sha256[:12]}"
        yield from self._overlaps(parts, protocol, clusters)
        yield from self._shapes(parts, apart, protocol, clusters)
        # The thresholds are no part of the convention, as they are outcomes themselves.
        for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
            if self.segmentation != "fixed" and (level := levels[kind]) is not None:
                metric, n = f"{prefix}otsu_threshold", len(scenes)
                yield Measurement(self.name, metric, float(level), "grey level", "unknown", n, None, protocol)
        for i, scene in enumerate(scenes[: self.pictures]):
            yield self._shown(scene, {kind: slices[kind][i] for kind in KINDS})

    def _parts(self, slices: Parts, split: Split) -> tuple[Parts, float, str, tuple[int, ...] | None]:
        """The slices, or the blocks of their volume, with the distance of slices, the words for it, and the clusters.

        Blocks of one volume are neighbours as its slices are; a volume is one sample where there are enough of them.
        """
        import numpy as np

        from llmq.statistics.estimates import FEWEST
        from llmq.vision.pores import blocks
        from llmq.vision.upscaled import in_stretches

        if self.dimensions == 2:
            clusters, alike = in_stretches(split, len(slices["truth"]))
            return slices, 1.0, alike, clusters
        apart = split.apart or 1.0
        # Slices of one volume are one stack; of several volumes each is cut by itself.
        depths = [len(pair.high) for pair in split.held_out[: self.limit] if pair.high.ndim == 4]
        ends = np.cumsum(depths, dtype=int)[:-1]
        cut = {
            kind: [blocks(stack, self.block, apart) for stack in np.split(np.stack(images), ends)]
            for kind, images in slices.items()
        }  # by volume
        parts = {kind: [part for volume in volumes for part in volume] for kind, volumes in cut.items()}
        if (scans := len(depths)) >= FEWEST:
            clusters = tuple(i for i, volume in enumerate(cut["truth"]) for _ in volume)
            alike = f"; standard error over {scans} volumes"
        else:
            clusters, alike = in_stretches(split, len(parts["truth"]), "blocks", least=2)  # all touch
        about = f"; blocks of about {self.block}³ of the volume, slices {apart:g} pixels apart{alike}"
        return parts, apart, about, clusters

    def _overlaps(self, parts: Parts, protocol: str, clusters: tuple[int, ...] | None) -> Iterator[Measurement]:
        """The pores of model and bicubic over the true ones."""
        from llmq.statistics import figures
        from llmq.vision.pores import two_point

        mean, ratio = (partial(figure, clusters=clusters) for figure in (figures.mean, figures.ratio))
        of = "slices" if self.dimensions == 2 else "blocks"
        for kind, prefix in (("model", ""), ("bicubic", "bicubic_")):
            pairs = list(zip(parts[kind], parts["truth"], strict=True))
            agreement = [float((p == t).mean()) for p, t in pairs]
            yield mean(self.name, f"{prefix}pixel_agreement", agreement, "share", "higher", protocol)
            shared, either = [float((p & t).sum()) for p, t in pairs], [float((p | t).sum()) for p, t in pairs]
            if not sum(either):
                raise UserError(f"none of the {of} has a pore to compare")
            convention = f"pores of both over pores of either, pixels of all {of} added up; {protocol}"
            yield ratio(self.name, f"{prefix}pore_iou", shared, either, "share", "higher", convention)
            twice, both = [2 * s for s in shared], [s + e for s, e in zip(shared, either, strict=True)]
            convention = f"twice the pores of both over the sum of pores, pixels of all {of} added up; {protocol}"
            yield ratio(self.name, f"{prefix}pore_dice", twice, both, "share", "higher", convention)
            errors = [float(abs(two_point(p, self.distance) - two_point(t, self.distance)).mean()) for p, t in pairs]
            convention = (
                f"mean absolute difference of the chance that two points 1 to {self.distance} pixels apart, along rows "
                f"and columns, are both pore; {protocol}"
            )
            yield mean(self.name, f"{prefix}two_point_error", errors, "probability", "lower", convention)

    def _shapes(
        self, parts: Parts, apart: float, protocol: str, clusters: tuple[int, ...] | None
    ) -> Iterator[Measurement]:
        """Each measure of model, truth and bicubic, and the errors of model and bicubic."""
        from llmq.statistics import figures

        mean = partial(figures.mean, clusters=clusters)
        of = "slices" if self.dimensions == 2 else "blocks"
        for metric, unit, words, measure in _measures(apart, self.dimensions):
            values = {kind: [measure(each) for each in parts[kind]] for kind in KINDS}
            for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
                convention = f"mean over {of} of {words}; {protocol}"
                yield mean(self.name, f"{prefix}{metric}", values[kind], unit, "unknown", convention)
            for kind, prefix in (("model", ""), ("bicubic", "bicubic_")):
                errors = [abs(a - b) for a, b in zip(values[kind], values["truth"], strict=True)]
                convention = f"mean over {of} of the absolute difference of {words}; {protocol}"
                yield mean(self.name, f"{prefix}{metric}_error", errors, unit, "lower", convention)
        yield from self._sizes(parts, apart, protocol, clusters)

    def _sizes(
        self, parts: Parts, apart: float, protocol: str, clusters: tuple[int, ...] | None
    ) -> Iterator[Measurement]:
        """The mean local thickness, and the distance of the distribution from the true one."""
        from scipy.stats import wasserstein_distance

        from llmq.statistics import figures

        mean = partial(figures.mean, clusters=clusters)
        of = "slices" if self.dimensions == 2 else "blocks"
        words = f"local thickness of pores (largest {'disc' if of == 'slices' else 'ball'} within, diameters 2, 4, …)"
        sizes = {kind: [_thicknesses(each, apart) for each in parts[kind]] for kind in KINDS}
        for kind, prefix in (("model", ""), ("truth", "true_"), ("bicubic", "bicubic_")):
            convention = f"mean over {of} of the mean {words}, 0 without pores; {protocol}"
            means = [float(each.mean()) for each in sizes[kind]]
            yield mean(self.name, f"{prefix}pore_size", means, "pixels", "unknown", convention)
        for kind, prefix in (("model", ""), ("bicubic", "bicubic_")):
            pairs = zip(sizes[kind], sizes["truth"], strict=True)
            errors = [float(wasserstein_distance(a, b)) for a, b in pairs]
            convention = f"mean over {of} of the Wasserstein distance of the distributions of {words}; {protocol}"
            yield mean(self.name, f"{prefix}pore_size_error", errors, "pixels", "lower", convention)

    def _shown(self, scene: "Upscaled", pores: "Mapping[str, ndarray]") -> Exhibit:
        from llmq.tasks.rock.picture import picture

        shares = {kind: f"{100 * pores[kind].mean():.1f} %" for kind in KINDS}
        made = f"porosity {shares['model']}; bicubic {shares['bicubic']}"
        return Exhibit(
            self.name,
            scene.name,
            "blue: a pore that is none; orange: a pore that was missed",
            made,
            f"porosity {shares['truth']}",
            picture(scene, pores, self.distance),
        )


def _measures(apart: float, dimensions: int) -> "list[tuple[str, str, str, Callable[[ndarray], float]]]":
    """Metric, unit, words and function of each measure of one slice or block."""
    from llmq.vision import pores

    per = "length of the boundary over the area" if dimensions == 2 else "area of the boundary over the volume"
    edge = "slice's" if dimensions == 2 else "block's"
    return [
        ("porosity", "share", "the share of pores", lambda p: float(p.mean())),
        ("connected_porosity", "share", f"the share of pores that reach the {edge} edge", pores.connected_porosity),
        (
            "euler_number",
            "",
            "the Euler number of the pores, neighbours by sides",
            lambda p: float(pores.euler_number(p)),
        ),
        ("specific_surface", "1/pixel", f"the {per}", partial(pores.specific_surface, apart=apart)),
    ]


def _thicknesses(pores: "ndarray", apart: float) -> "ndarray":
    """The local thickness of every pixel of pores; a single 0 without pores."""
    import numpy as np

    from llmq.vision.pores import local_thickness

    return local_thickness(pores, apart)[pores] if pores.any() else np.zeros(1)

"""The kinds of models that a file can be."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from llmq.errors import UserError
from llmq.types import Split
from llmq.vision.classifier import Classifier, as_timm_evaluates, with_channels
from llmq.vision.decodings import DECODINGS, Decoding, Found, selected
from llmq.vision.detector import Detections, Detector
from llmq.vision.foreign.family import BY_OPENCV, GREY, LETTERBOXED, Foreign, resized
from llmq.vision.generator import Generator, drawing
from llmq.vision.super_resolution import SuperResolution, Window

if TYPE_CHECKING:
    from numpy import ndarray
    from openvino import Model
    from torch import Tensor

    from llmq.types import Loaded
    from llmq.vision.detector import Fitted, Images, Sizes, Targets

SHARES = 1.5
"""Boxes in pixels reach further; in shares of the input none does, but for a little."""
FAR, OUTSIDE = 0.01, 0.25
"""The shares of values far outside of the range that a generator's settings name (by half of the range and more), and
just outside, from which the range is wrong: some generators overshoot a little."""


class ForeignClassifier(Foreign, Classifier):
    kind: ClassVar[str] = Classifier.kind
    suite: ClassVar[str] = Classifier.suite

    @property
    def outputs(self) -> int:
        return self.classes or 0

    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.labels)

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        """Scale images and cut out the middle, as timm and torchvision evaluate, in the numbers of the graph."""
        import torch

        assert self.sides
        seen = as_timm_evaluates(
            images,
            self.channels,
            self.sides,
            mean=(0.0,) * self.channels,
            std=(1.0,) * self.channels,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return torch.stack([self._input(255 * pixels) for pixels in seen])

    def logits(self, loaded: "Loaded", images: "Sequence[ndarray]") -> "Tensor":
        """The logits; the logarithms of chances. Raises `UserError` for chances that no setting tells of."""
        made = super().logits(loaded, images)  # (n, classes)
        add_up = made.shape[1] > 1 and bool((made >= 0).all()) and bool(((made.sum(1) - 1).abs() < 1e-3).all())
        if add_up != self.chances:
            told = "chances that add up to 1; set chances: true" if add_up else "no chances; leave chances out"
            raise UserError(f"{self.weights!r} answers with {told}")
        return made.clamp_min(1e-12).log() if add_up else made

    def _fitted(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != 1:
            raise self._misfit(shapes, "one output [images, classes]")
        return self._of_classes(shapes[0][1])


class ForeignDetector(Foreign, Detector):
    kind: ClassVar[str] = Detector.kind
    suite: ClassVar[str] = Detector.suite

    def check(self) -> None:
        super().check()
        if self.decoding is None:
            raise UserError(f"a detector needs its decoding: {', '.join(DECODINGS)}")
        if self.decoding == "boxes" and not (self.classes or self.labels):
            raise UserError("decoding: boxes does not tell the number of classes; set classes or labels")
        if not self._decoding.nms and self.nms_threshold != type(self).model_fields["nms_threshold"].default:
            raise UserError(f"decoding: {self.decoding} suppresses no boxes; leave nms_threshold out")

    @property
    def _decoding(self) -> Decoding:
        return DECODINGS[str(self.decoding)]

    def class_count(self) -> int:
        return self.classes or len(self.labels)

    def class_names(self) -> tuple[str, ...]:
        return self.labels

    def fit(self, images: "Images", targets: "Targets | None" = None) -> "Fitted":
        import torch

        assert self.sides
        made, filled = [], []
        for image in images:
            rows, columns, top, left = self._place(*image.shape[:2])
            pixels = torch.full((self.channels, *self.sides), float(GREY))
            pixels[:, top : top + rows, left : left + columns] = resized(
                pixels_of(image, self.channels), rows, columns, self._antialias
            )
            made.append(self._input(pixels))
            filled.append((rows, columns))
        return torch.stack(made), filled, targets

    @property
    def _antialias(self) -> bool:
        return self.decoding not in BY_OPENCV if self.antialias is None else self.antialias

    def _place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The rows and columns that an image fills in the input, and the first of each."""
        assert self.sides
        rows, columns = self.sides
        if not (self.decoding in LETTERBOXED if self.letterbox is None else self.letterbox):
            return rows, columns, 0, 0
        scale = min(rows / height, columns / width)
        high, wide = (max(1, round(n * scale)) for n in (height, width))
        return high, wide, (rows - high) // 2, (columns - wide) // 2

    def decode(self, raw: "tuple[Tensor, ...]", fitted: "Sizes", sizes: "Sizes") -> list[Detections]:
        import torch

        assert self.sides
        found = self._decoding.decode(raw, self.sides)
        self._check(found)
        overlap = self.nms_threshold if self._decoding.nms else None
        made = []
        chosen = selected(found, self.score_threshold, overlap, self.max_detections)
        for (corners, scores, labels), (height, width) in zip(chosen, sizes, strict=True):
            rows, columns, top, left = self._place(height, width)
            boxes = (corners - torch.tensor([left, top, left, top])) * torch.tensor(
                [width / columns, height / rows, width / columns, height / rows]
            )
            boxes = boxes.clamp(torch.zeros(4), torch.tensor([width, height, width, height]).float())  # (k, 4)
            made.append(Detections(boxes.numpy(), scores.numpy(), self._numbered(labels).numpy()))
        return made

    def _check(self, found: "Found") -> None:
        """Raise `UserError` for scores that are no chances, and boxes that are none in pixels of the input."""
        for corners, scores, _ in found:
            if len(scores) and not -0.001 <= float(scores.min()) <= float(scores.max()) <= 1.001:
                raise self._unlike(f"scores from {float(scores.min()):.3g} to {float(scores.max()):.3g}", "chances")
            seen = corners[scores >= self.score_threshold]
            if len(seen) and float(seen.abs().max()) <= SHARES:
                raise self._unlike(f"boxes up to {float(seen.abs().max()):.3g}", "pixels of its input, no shares")
            if self.decoding == "boxes" and bool((seen[:, 2:] < seen[:, :2] - 1).any()):
                raise self._unlike("boxes that end before they begin", "corners: x0, y0, x1, y1")

    def _unlike(self, made: str, needed: str) -> UserError:
        return UserError(f"{self.weights!r} gives {made}, and decoding: {self.decoding} needs {needed}")

    def check_split(self, split: Split) -> None:
        self.check_images(split)  # calibration reads no classes; `places` compares them

    def outputs_of(self, split: Split) -> Mapping[int, str]:
        return {}  # it learns no classes of any data

    def places(self, split: Split) -> list[int] | None:
        """As of other detectors; classes go by number only where there are as many: COCO's 80 may have 91 numbers."""
        made = super().places(split)
        if made is None and len(split.classes) != self.class_count():
            raise UserError(
                f"{self.weights!r} tells {self.class_count()} classes apart, and the data has {len(split.classes)}; "
                "set labels, the names of the outputs in their order"
            )
        return made

    def _numbered(self, labels: "Tensor") -> "Tensor":
        """Labels from 0. Raises `UserError` for one that is no class."""
        made = labels - self.first_label
        if len(made) and not 0 <= int(made.min()) <= int(made.max()) < self.class_count():
            raise UserError(
                f"{self.weights!r} gives labels {int(labels.min())} to {int(labels.max())}, and these settings have "
                f"{self.class_count()} classes from {self.first_label}; set classes or first_label"
            )
        return made

    def detect(self, loaded: "Loaded", images: "Images", batch_size: int = 16) -> list[Detections]:
        # A graph that selects boxes gives one image as many rows as it finds.
        return super().detect(loaded, images, 1 if self.decoding == "boxes" else batch_size)

    def _fitted(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        count = self._decoding.class_count(shapes, str(self.weights))
        # Boxes are many and classes few: the axis of classes is the longest in another layout, such as yolov8's.
        told = self.classes or self.labels
        if count and not told and [len(shape) for shape in shapes] == [3] and max(shapes[0]) - count <= 5:
            raise UserError(
                f"{self.weights!r} answers with {list(shapes[0])}, {count} classes by decoding: {self.decoding}; "
                "take another decoding, or set classes if there are so many"
            )
        return self._of_classes(count) if count else self


class ForeignQueries(ForeignDetector):
    """A detector whose queries come in an order without meaning."""

    @property
    def unordered(self) -> bool:
        return True


class ForeignSuperResolution(Foreign, SuperResolution):
    kind: ClassVar[str] = SuperResolution.kind
    suite: ClassVar[str] = SuperResolution.suite

    @property
    def reach(self) -> int:
        """A distance that few networks exceed: a graph does not tell its own."""
        return 48

    @property
    def sides(self) -> None:
        """Images of any size, or no image could be made in tiles."""
        return

    def _sized(self) -> Self:
        return self

    def example(self, batch_size: int) -> "Tensor":
        return self._ranged(SuperResolution.example(self, batch_size))

    def prepare(self, images: "Sequence[ndarray]") -> "Tensor":
        return self._ranged(SuperResolution.prepare(self, images))

    def _ranged(self, values: "Tensor") -> "Tensor":
        low, high = self.value_range
        return (values.flip(1) if self.colours == "bgr" else values) * (high - low) + low  # (n, channels, h, w)

    def enlarged(self, loaded: "Loaded", low: "ndarray") -> "Iterator[tuple[Window, ndarray]]":
        black, white = self.value_range
        for place, made in super().enlarged(loaded, low):
            values = made[..., ::-1] if self.colours == "bgr" else made
            yield place, (values - 255 * black) / (white - black)

    def _fitted(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        wanted = (1, self.channels, 48 * self.scale, 48 * self.scale)
        if list(shapes) != [wanted]:
            raise self._misfit(shapes, f"{list(wanted)} at scale {self.scale}")
        return self


class ForeignGenerator(Foreign, Generator):
    kind: ClassVar[str] = Generator.kind
    suite: ClassVar[str] = Generator.suite

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.latent or ()

    def example(self, batch_size: int) -> "Tensor":
        return Generator.example(self, batch_size)

    def latents(self, n: int, seed: int, purpose: str = "samples") -> "Tensor":
        import torch

        if self.noise == "normal":
            return super().latents(n, seed, purpose)
        return torch.rand(n, *self.latent_shape, generator=drawing(seed, purpose)) * 2 - 1

    def grey(self, outputs: "Tensor") -> "Tensor":
        """Grey levels by `value_range`. Raises `UserError` for values that lie far outside of it."""
        low, high = self.value_range
        levels = (outputs.double() - low) / (high - low)
        beyond = (levels - levels.clamp(0, 1)).abs()
        if float((beyond > 0.5).double().mean()) > FAR or float((beyond > 0.01).double().mean()) > OUTSIDE:
            raise UserError(
                f"{self.weights!r} makes values from {float(outputs.min()):.3g} to {float(outputs.max()):.3g}, and "
                f"value_range says {list(self.value_range)}; set value_range to what black and white are"
            )
        return (levels.flip(1) if self.colours == "bgr" else levels).clamp(0, 1) * 255  # (n, channels, h, w)

    def _sized(self) -> Self:
        shape = self._read().input(0).partial_shape
        if self.latent is not None:
            return self
        if shape.rank.is_dynamic or len(shape) < 2 or any(d.is_dynamic for d in list(shape)[1:]):
            raise UserError(f"{self.weights!r} takes {shape} and names no size of latents; set latent")
        return self.model_copy(update={"latent": tuple(d.get_length() for d in list(shape)[1:])})

    def _read(self) -> "Model":
        from llmq.vision.foreign.graph import check_file, of_latents, read

        path = check_file(self.weights)
        return of_latents(read(path), path, self.layout == "nhwc")

    def _reshaped(self, graph: "Model") -> "Model":
        from llmq.vision.foreign.graph import with_latent

        return with_latent(graph, self.weights, self.latent_shape)

    def _fitted(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        found = shapes[0][2:]
        if shapes[0][:2] != (1, self.channels) or (self.sides and self.sides != found):
            told = " x ".join(map(str, self.sides)) if self.sides else "rows, columns"
            raise self._misfit(shapes, f"[1, {self.channels}, {told}]; set channels, size or layout")
        return self.model_copy(update={"size": found})


def family_of(model: Foreign) -> type[Foreign]:
    """The class of a kind."""
    if model.is_a == "detector":
        return ForeignQueries if model.decoding in ("detr", "rtdetr", "dfine") else ForeignDetector
    kinds = {"classifier": ForeignClassifier, "super-resolution": ForeignSuperResolution, "gan": ForeignGenerator}
    return kinds[model.is_a]


def pixels_of(image: "ndarray", channels: int) -> "Tensor":
    """A uint8 image `(height, width, any)` as float grey levels `(channels, height, width)`."""
    import torch

    return torch.from_numpy(with_channels(image, channels).copy()).permute(2, 0, 1).float()

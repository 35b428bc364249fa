"""The settings of a graph that somebody exported, and the way from its file to a stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from llmq.artifact import Artifact
from llmq.errors import UserError, explain
from llmq.files import at_home, cache, make_whole, sha256_files, sha256_text
from llmq.terminal import say
from llmq.types import Context
from llmq.vision.family import ImageModel, Training, noise
from llmq.vision.foreign.graph import check_file, files_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvino import Model
    from torch import Tensor

    from llmq.vision.sizing import ImageSketch

Numbers = tuple[float, ...]
Layouts = Literal["yolov5", "yolov8", "yolo11", "fastestdet", "ssd", "detr", "rtdetr", "dfine", "boxes"]
LETTERBOXED = ("yolov5", "yolov8", "yolo11")
BY_OPENCV = (*LETTERBOXED, "fastestdet", "ssd")
"""The decodings of detectors whose makers scale images by OpenCV, which does not average where they shrink."""
GREY = 114
"""The grey level around a letterboxed image, as ultralytics has it."""
FARTHEST = 30
"""Standard deviations that black and white lie from the mean, at most: those of photographs lie within 3."""
SAME = {"label_names": "labels"}
"""Settings of llmq's own families by another name than here."""
OWN = {
    "classifier": {"labels", "classes", "size", "mean", "std", "chances"} | {"crop_pct", "crop_mode", "interpolation"},
    "detector": {"labels", "classes", "size", "mean", "std", "decoding", "letterbox", "antialias", "first_label"}
    | {"nms_threshold", "score_threshold", "max_detections"},
    "super-resolution": {"scale", "tile", "overlap"},
    "gan": {"latent", "noise", "size"},
}
"""The settings that only some kinds read."""


class Foreign(ImageModel):
    """A graph of a stated kind. Each kind is a subclass; only the file tells its shapes, which `resolved` writes down.

    A setting that another kind reads is refused.
    """

    kind: ClassVar[str] = "classifier"
    suite: ClassVar[str] = "classifier"
    training: ClassVar[Training] = Training(1, 1e-4, "no loss")
    begins_in: ClassVar[str] = "openvino"

    is_a: Literal["classifier", "detector", "super-resolution", "gan"] = Field(description="the kind of the network")
    weights: str = Field(description="an .onnx file, or OpenVINO's .xml with its .bin beside it")
    layout: Literal["nchw", "nhwc"] = Field("nchw", description="of the images: channels before or after the pixels")
    channels: Literal[1, 3] = Field(3, description="of the images; they become grey for 1")
    colours: Literal["rgb", "bgr"] = Field("rgb", description="order of the channels")
    value_range: tuple[float, float] = Field((0.0, 1.0), description="that black and white are in the graph")
    mean: Numbers = Field((0.0,), description="taken off after that, one for all channels or one for each")
    std: tuple[PositiveFloat, ...] = Field((1.0,), description="divided by after that")
    size: tuple[PositiveInt, PositiveInt] | PositiveInt | None = Field(
        None, description="side of the square image, or its rows and columns; needed where the file leaves it open"
    )
    classes: PositiveInt | None = Field(None, description="as the outputs have; needed for decoding: boxes")
    labels: tuple[str, ...] = Field((), description="names of the classes, in their order")
    chances: bool = Field(False, description="true for a classifier that ends in a softmax")
    crop_pct: float = Field(0.875, gt=0, le=1, description="share of the shorter side that a classifier sees, as timm")
    crop_mode: Literal["center", "squash", "border"] = Field(
        "center", description="the middle of the image, all of it without its proportions, or with edges; as timm"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field(
        "bilinear", description="of the image to the size of a classifier, by Pillow"
    )
    decoding: Layouts | None = Field(None, description="layout of a detector's outputs; boxes: selected by the graph")
    letterbox: bool | None = Field(None, description="keep proportions, grey around; unset: for yolo alone")
    antialias: bool | None = Field(
        None, description="average where a detector's image shrinks; unset: not for those that are fed by OpenCV"
    )
    first_label: int = Field(0, ge=0, description="number of the first class; 1 where 0 is the background")
    nms_threshold: float = Field(0.6, gt=0, le=1, description="of boxes of one class that overlap more, one is kept")
    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are not reported")
    max_detections: PositiveInt = Field(100, description="in one image")
    scale: Literal[2, 3, 4] = Field(4, description="of super-resolution")
    tile: PositiveInt = Field(256, description="low-resolution pixels; larger images are made in tiles of this side")
    overlap: int | None = Field(None, ge=0, description="pixels that a tile sees of its neighbours; 48 if unset")

    latent: tuple[PositiveInt, ...] | None = Field(
        None, description="shape of one latent of a gan, such as [100, 1, 1]; needed where the file leaves it open"
    )
    noise: Literal["normal", "uniform"] = Field("normal", description="latents of a gan; uniform: from -1 to 1")

    @property
    def word(self) -> str:
        return "models.exported"

    def check(self) -> None:
        check_file(self.weights)
        others = set().union(*OWN.values()) - OWN[self.is_a]
        fields = type(self).model_fields
        if odd := [name for name in fields if name in others and getattr(self, name) != fields[name].get_default()]:
            raise UserError(f"{odd[0]} is no setting of a {self.is_a}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise UserError(
                    f"{name} has {len(getattr(self, name))} numbers, and the input {self.channels} channels"
                )
        low, high = self.value_range
        if low == high:
            raise UserError(f"value_range {self.value_range}: black and white must differ")
        far = max(abs(end - mean) / std for end in (low, high) for mean in self.mean for std in self.std)
        beyond = next((mean for mean in self.mean if not min(low, high) <= mean <= max(low, high)), None)
        if beyond is not None or (any(self.mean) and max(self.std) < 1 and far > FARTHEST):
            told = f"mean {beyond:g}" if beyond is not None else f"std {min(self.std):g}"
            raise UserError(f"{told} is not of images in value_range {list(self.value_range)}; set both in one unit")

    def source(self) -> str:
        return f"{self.weights} {sha256_files(files_of(check_file(self.weights)))[:16]}"

    def sketch(self) -> ImageSketch:
        from llmq.sketch import Sketch

        if not at_home(self.weights).is_file():  # a plan asks no more of a sketch that says so
            unknown = f"there is no file {self.weights!r}, and only the file of a graph tells its size"
            return cast("ImageSketch", Sketch((), "float32", unknown=unknown))
        from llmq.vision.foreign.sizing import sketch_of

        return sketch_of(self.resolved())

    def base(self, context: Context) -> Artifact[Self]:
        """The graph in the cache, for OpenVINO, opened and run once; `notes` say where it came from."""
        from llmq.environment import library_version

        model = self.resolved()
        about = [model.model_dump_json(), where := model.source(), str(library_version("openvino"))]
        folder = cache("models", f"exported-{sha256_text(*about)[:16]}")
        make_whole(folder, partial(model.write_graph), shared=True)
        return Artifact(model, folder, runtime=self.begins_in, notes={"source": where})

    def resolved(self) -> Self:
        """These settings with what the file tells, its outputs seen for one input. Raises `UserError` for misfits."""
        from tempfile import TemporaryDirectory

        from llmq.vision.apart import check_opens
        from llmq.vision.exported import ExportedModule
        from llmq.vision.family import as_tuple

        made = self._told()._sized()
        with TemporaryDirectory() as folder:
            made.write_graph(Path(folder))
            example = made.example(1)
            check_opens(Path(folder), made.title, example)
            module = ExportedModule(Path(folder))
            return made._fitted([tuple(t.shape) for t in as_tuple(module(example))])

    def _told(self) -> Self:
        """These settings, and of those left unset what a file of llmq tells of the images it takes."""
        from llmq.vision.foreign.graph import settings_of

        known = (OWN[self.is_a] | {"channels"}) - self.model_fields_set
        told = {
            SAME.get(name, name): value
            for name, value in settings_of(self._read(), at_home(self.weights)).items()
            if value
        }
        if not (taken := {name: value for name, value in told.items() if name in known}):
            return self
        try:
            made = type(self)(**{name: getattr(self, name) for name in self.model_fields_set}, **taken)
        except ValidationError as error:
            raise UserError(
                f"{self.weights!r} tells settings of itself that do not fit: {explain(error.errors()[:1], None)}"
            ) from None
        say(f"{self.weights}: {', '.join(sorted(taken))} as llmq wrote them with the file")
        made.check()
        return made

    def _sized(self) -> Self:
        """These settings with the size of the input in the file."""
        shape = self._read().input(0).partial_shape
        if self.size is not None:
            return self
        if shape.rank.get_length() != 4 or any(shape[i].is_dynamic for i in (2, 3)):
            raise UserError(f"{self.weights!r} takes {shape} and names no size of images; set size")
        return self.model_copy(update={"size": (shape[2].get_length(), shape[3].get_length())})

    def _read(self) -> Model:
        from llmq.vision.foreign.graph import of_images, read

        path = check_file(self.weights)
        return of_images(read(path), path, self.layout == "nhwc", self.value_range)

    def _fitted(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        """These settings with what the shapes of the outputs tell. Raises `UserError` for outputs of another kind."""
        raise NotImplementedError

    def _of_classes(self, count: int) -> Self:
        """These settings with the number of classes of the outputs. Raises `UserError` if settings tell another."""
        for name, told in (("classes", self.classes), ("labels", len(self.labels))):
            if told and told != count:
                raise UserError(f"{self.weights!r} tells {count} classes apart, and {name} tells of {told}")
        return self.model_copy(update={"classes": count})

    def write_graph(self, folder: Path) -> None:
        """Write the graph as llmq opens it: for OpenVINO, in the usual layout, with the size of the input."""
        from llmq.vision.foreign.graph import written

        written(self._reshaped(self._read()), folder)

    def _reshaped(self, graph: Model) -> Model:
        """The graph for the input of these settings. Raises `UserError` where it takes another."""
        from llmq.vision.foreign.graph import boxes_first, with_size

        graph = boxes_first(graph, self.weights) if self.decoding == "boxes" else graph
        return with_size(graph, self.weights, self.channels, self.sides)

    @property
    def sides(self) -> tuple[int, int] | None:
        """The rows and columns of the input; None for any."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _misfit(self, shapes: Sequence[tuple[int, ...]], needed: str) -> UserError:
        there = ", ".join(str(list(shape)) for shape in shapes)
        return UserError(f"{self.weights!r} answers with {there} for one input, and a {self.is_a} gives {needed}")

    def example(self, batch_size: int) -> Tensor:
        rows, columns = self.sides or (48, 48)
        return noise(batch_size, self.channels, rows, columns)

    def _input(self, pixels: Tensor) -> Tensor:
        """Grey levels of 0 to 255 `(channels, rows, columns)`, in RGB, as numbers that the graph takes."""
        import torch

        low, high = self.value_range
        values = (pixels.flip(0) if self.colours == "bgr" else pixels) / 255 * (high - low) + low
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))  # (1 or channels, 1, 1)
        return (values - mean) / std


def resized(pixels: Tensor, rows: int, columns: int, antialias: bool) -> Tensor:
    """Grey levels `(channels, height, width)`, scaled bilinearly, whole numbers as of an image.

    With `antialias` as Pillow does, averaging where the image shrinks; without as OpenCV does.
    """
    from torch.nn.functional import interpolate

    if pixels.shape[1:] == (rows, columns):
        return pixels
    return interpolate(pixels[None], (rows, columns), mode="bilinear", antialias=antialias)[0].round()

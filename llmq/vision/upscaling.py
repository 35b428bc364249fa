"""Pictures and volumes enlarged by a super-resolution network: the same format, and the same kind of numbers.

Every slice is made by tiles and goes to disk as it is made, so that memory does not grow with the file. Bytes are grey
levels. Other numbers go through a window, whose ends become 0 and 1 for the network; what lies beyond is cut to its
ends, and the answer goes back through the same window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from llmq.errors import LlmqError, UserError
from llmq.predictors import PICTURES, Input, Inputs, Predictor
from llmq.terminal import Bar, say
from llmq.vision.dicom import is_dicom
from llmq.vision.pixels import check_window, is_tiff
from llmq.vision.rasters import VOLUMES, Enlarged, Raster, read_raster

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.types import Loaded

BESIDE = ("bicubic", "model", "difference")
VIEW = 512  # low-resolution pixels of a side, of the pictures beside
MARGIN = 4  # low-resolution pixels; bicubic interpolation reaches 2


@dataclass(frozen=True)
class Levels:
    """The map of a file's numbers to the network's inputs, and back."""

    low: float
    high: float
    dtype: Any

    @classmethod
    def of(cls, raster: Raster, window: tuple[float, float] | None, name: str) -> Levels:
        """Bytes as they are; other numbers through `window`, or else from the file's least to its largest number."""
        import numpy as np

        pixels = raster.pixels
        is_bytes = pixels.dtype == np.uint8
        if window and not (is_bytes and window[1] > 255):  # such a window is meant for deeper files
            _say_beyond(pixels, window, name)
            return cls(*window, pixels.dtype)
        if is_bytes:
            return cls(0, 255, pixels.dtype)
        low, high = float(pixels.min()), float(pixels.max())
        say(f"{name}: {pixels.dtype} without a window: {low:g} to {high:g}, all of it, becomes grey levels 0 and 255")
        return cls(low, high if high > low else low + 1, pixels.dtype)

    def inputs(self, image: ndarray) -> ndarray:
        """The network's input, `(…, height, width, channels)`: bytes, or float32 on [0, 1]."""
        import numpy as np

        image = image[..., None] if image.ndim == 2 else image
        if (self.low, self.high, self.dtype) == (0, 255, np.uint8):
            return image
        unit: ndarray = (image.astype(np.float64) - self.low) / (self.high - self.low)
        made: ndarray = unit.clip(0, 1).astype(np.float32)
        return made

    def numbers(self, levels: ndarray) -> ndarray:
        """The file's numbers for grey levels of 255; integers are rounded, halves up, and kept within their kind."""
        import numpy as np

        kind = np.float32 if self.dtype.itemsize == 1 else np.float64  # bytes come by the thousand million
        made: ndarray = np.multiply(levels, (self.high - self.low) / 255, dtype=kind)
        made += self.low
        if self.dtype.kind in "ui":
            ends = np.iinfo(self.dtype)
            made += 0.5
            np.clip(np.floor(made, out=made), ends.min, ends.max, out=made)
        typed: ndarray = made.astype(self.dtype)
        return typed

    def shown(self, image: ndarray) -> ndarray:
        """Numbers of the file as grey levels of 255, `(height, width, channels)`."""
        import numpy as np

        image = image if image.ndim == 3 else image[..., None]
        made: ndarray = ((image.astype(np.float64) - self.low) * (255 / (self.high - self.low))).clip(0, 255)
        return made


def _say_beyond(pixels: ndarray, window: tuple[float, float], name: str) -> None:
    beyond = sum(int(((each < window[0]) | (each > window[1])).sum()) for each in pixels)
    if beyond:
        say(f"{name}: {beyond / pixels.size:.2%} lie beyond the window {window[0]:g} to {window[1]:g}: cut to it")


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f"{target.name}.{word}.png")


class Upscaling(Predictor):
    suffixes: ClassVar[frozenset[str]] = PICTURES | {*VOLUMES, ".dcm"}

    beside: bool = Field(False, description="also write bicubic and difference pictures, of the middle")
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; the run's, else all that the file holds"
    )

    def check(self, item: Input, model: Any) -> None:
        """Raise `UserError` for a file that cannot be read, or whose numbers the network cannot take."""
        import numpy as np

        check_window(self.window)
        pixels = read_raster(item.path).pixels
        if pixels.dtype.kind == "f" and not all(bool(np.isfinite(each).all()) for each in pixels):
            raise UserError(f"{item.path}: holds numbers that are not finite; fill them first")
        if model.volumetric and (pixels.ndim == 4 or len(pixels) < 2):
            raise UserError(
                f"{item.path}: is {pixels.shape}, and this network enlarges volumes of grey slices (z, y, x)"
            )
        if model.volumetric and self.beside:
            raise UserError("--beside shows slices, and this network enlarges volumes; leave it out")
        if min(pixels.shape[1:3]) < 2:
            raise UserError(f"{item.path}: is {pixels.shape[1]} x {pixels.shape[2]} pixels; 2 a side are needed")

    def targets(self, item: Input) -> list[Path]:
        """The file enlarged, and the pictures beside it."""
        kept = item.path.suffix.lower() in VOLUMES or (is_tiff(item.path) and not is_dicom(item.path))
        suffix = item.place.suffix if kept else ".tif" if is_dicom(item.path) else ".png"
        target = item.place.with_suffix(suffix)
        return [target, *(_beside(target, word) for word in BESIDE if self.beside)]

    def write(self, loaded: Loaded, inputs: Inputs, folder: Path) -> int:
        """Write each file enlarged, under its own name; returns the number of slices."""
        slices = 0
        for item in inputs.items:
            target = folder / self.targets(item)[0]
            raster = read_raster(item.path)
            if raster.transparent:
                say(f"{item.name}: its transparency is not enlarged; what is written has none")
            if raster.of_ome:
                say(
                    f"{item.name}: the size of voxels in its description of OME is not understood, and not carried over"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            model: Any = loaded.artifact.model
            enlarge = self._enlarge_whole if model.volumetric else self._enlarge
            enlarge(loaded, raster, target, item)
            slices += len(raster.pixels)
        return slices

    def _enlarge(self, loaded: Loaded, raster: Raster, target: Path, item: Input) -> None:
        import numpy as np

        model: Any = loaded.artifact.model
        levels = Levels.of(raster, self.window, item.name)
        made = Enlarged(raster, target, model.scale)
        apart = raster.pixels.ndim == 4 and model.channels == 1  # colours through a grey network, one by one
        first = levels.inputs(raster.pixels[0])
        colours = [slice(c, c + 1) for c in range(first.shape[2])] if apart else [slice(None)]
        bar = Bar(f"upscaling {item.name}", len(raster.pixels) * len(colours) * model.tile_count(loaded, first))
        for image, high in zip(raster.pixels, made.slices, strict=True):
            seen, view = levels.inputs(image), high if high.ndim == 3 else high[..., None]  # (height, width, channels)
            for colour in colours:
                for place, grey in model.enlarged(loaded, seen[..., colour]):
                    if not np.isfinite(grey).all():  # whole numbers would hide a NaN
                        raise LlmqError(f"{item.name}: what the network makes of it are no finite numbers")
                    view[(*place, colour)] = levels.numbers(grey)
                    bar.advance()
        bar.close()
        if self.beside:
            self._write_beside(model.scale, raster, made, levels, target)
        made.save()

    def _enlarge_whole(self, loaded: Loaded, raster: Raster, target: Path, item: Input) -> None:
        """Enlarge a volume along all three axes, by tiles that go to disk as they are made."""
        import numpy as np

        model: Any = loaded.artifact.model
        levels = Levels.of(raster, self.window, item.name)
        made = Enlarged(raster, target, model.scale, volumetric=True)
        seen = levels.inputs(raster.pixels[..., None])  # (z, y, x, 1)
        bar = Bar(f"upscaling {item.name}", model.tile_count(loaded, seen))
        for place, grey in model.enlarged(loaded, seen):
            if not np.isfinite(grey).all():
                raise LlmqError(f"{item.name}: what the network makes of it are no finite numbers")
            made.slices[place] = levels.numbers(grey[..., 0])
            bar.advance()
        bar.close()
        made.save()

    def _write_beside(self, scale: int, raster: Raster, made: Enlarged, levels: Levels, target: Path) -> None:
        """Write the middle square of the middle slice: bicubic, the network's, and their difference around 128."""
        from PIL import Image

        from llmq.vision.degrade import bicubic, to_uint8

        middle = len(raster.pixels) // 2
        image = raster.pixels[middle]
        spans = [(max(0, (size - VIEW) // 2), min(size, (size + VIEW) // 2)) for size in image.shape[:2]]
        around = tuple(slice(max(0, begin - MARGIN), end + MARGIN) for begin, end in spans)
        kept = tuple(
            slice((begin - wide.start) * scale, (end - wide.start) * scale)
            for (begin, end), wide in zip(spans, around, strict=True)
        )
        place = tuple(slice(begin * scale, end * scale) for begin, end in spans)
        simple = bicubic(levels.shown(image[around]), scale).clip(0, 255)[kept]  # (height, width, channels)
        ours = levels.shown(made.slices[middle][place])
        for word, picture in zip(BESIDE, (simple, ours, 128 + ours - simple), strict=True):
            pixels = to_uint8(picture)
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(_beside(target, word))

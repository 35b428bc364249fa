"""The examples of image data sets: images from files, splits, and classes numbered as a network numbers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError
from llmq.files import sha256, sha256_text
from llmq.types import Split
from llmq.vision.dicom import is_dicom, read_dicom
from llmq.vision.pixels import ORIENTATION, Window, as_bytes, is_tiff, range_of, read_tiff, readable

if TYPE_CHECKING:
    from pathlib import Path

    from numpy import ndarray
    from numpy.random import Generator
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    from llmq.vision.degrade import Disturbance


VOLUMES = "low/high volumes"
"""The shape of pairs of volumes `(z, y, x, channels)`, where pairs of images are low/high."""


@dataclass(frozen=True)
class Example:
    """An image and its annotations.

    In a super-resolution pair `image` is the low-resolution image and `high` the high-resolution one. `areas` is None
    where the annotations do not give them. `crowds` are regions of many objects: no network learns from them, and
    detections in them are neither right nor wrong.
    """

    name: str
    image: ndarray  # uint8 (height, width, channels)
    label: int | None = None  # of the whole image
    boxes: Any = None  # float32 (n, 4): x0, y0, x1, y1 in pixels
    labels: Any = None  # int64 (n,), of the boxes
    high: Any = None  # uint8 (height * scale, width * scale, channels)
    areas: Any = None  # float64 (n,), of the objects in the boxes, in square pixels
    crowds: Any = None  # (m, 4), as boxes
    crowd_labels: Any = None  # (m,)
    disturbance: Disturbance | None = None
    """The noise and blur that training adds to `image`, drawn anew at each step."""

    def drawn(self, rng: Generator) -> ndarray:
        """The image as training sees it once."""
        return self.disturbance.of(self.image, rng) if self.disturbance else self.image

    def seen(self, rng: Generator) -> Example:
        """The example with its image as training sees it once."""
        return replace(self, image=self.drawn(rng), disturbance=None)


@dataclass(frozen=True)
class Lazily(Sequence[Example]):
    """Examples that are opened at each access, so that few are in memory at once."""

    items: Sequence[object]
    open: Callable[[Any], Example] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return Lazily(self.items[i], self.open) if isinstance(i, slice) else self.open(self.items[i])

    def __iter__(self) -> Iterator[Example]:
        return map(self.open, self.items)


def read_image(path: Path, channels: int = 3, window: Window | None = None) -> ndarray:
    """Read a file as uint8 `(height, width, channels)`, turned by its EXIF orientation.

    `window` maps numbers other than bytes to grey levels: its ends become 0 and 255. Raises `UserError` for a file that
    no reader opens, that holds several images, or that has more than 8 bits a channel and no window.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    if is_dicom(path):
        return in_channels(_alone(path, read_dicom(path).pixels, window), channels)
    image = _of_tiff(path, window) if is_tiff(path) else _by_pillow(path, channels, window)
    return in_channels(image, channels)


def in_channels(image: ndarray, channels: int) -> ndarray:
    """Bring uint8 `(height, width[, 3])` to `(height, width, channels)`; Pillow weighs the colours of grey."""
    import numpy as np
    from PIL import Image

    if image.ndim == 3 and channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat(image[..., None], channels, axis=-1) if image.ndim == 2 else image


def _of_tiff(path: Path, window: Window | None) -> ndarray:
    return _alone(path, read_tiff(path)[0], window)


def _alone(path: Path, pixels: ndarray, window: Window | None) -> ndarray:
    """The one slice of `(slices, height, width[, 3])` as uint8."""
    if len(pixels) > 1:
        raise UserError(f"{path}: holds {len(pixels)} images, and one is needed; save each in a file of its own")
    return as_bytes(pixels, window, str(path), _too_deep(f"{pixels.dtype}, {range_of(pixels)},"))[0]


def _by_pillow(path: Path, channels: int, window: Window | None) -> ndarray:
    import numpy as np
    from PIL import Image, ImageOps

    with readable(path, "image"), Image.open(path) as opened:
        check_single(path, opened)
        deep, plain, white = deep_mode(path, opened), opened.mode.startswith(("I", "F")), white_of(opened)
        if deep and window is None:
            raise UserError(f"{path}: {_too_deep(deep)}")
        shown = ImageOps.exif_transpose(opened)
        pixels = unstretched(shown, white) if plain else np.asarray(shown.convert("RGB" if channels == 3 else "L"))
    return pixels if window is None else as_bytes(pixels[None], window, str(path), "")[0]


def _too_deep(what: str) -> str:
    return f"{what} holds more than 8 bits a pixel; scale it to 8 and save it again, or set window: [low, high]"


def size_of_file(path: Path) -> tuple[int, int, int]:
    """Read the width and height of the turned image and its EXIF orientation (1: not turned) off the head of a file."""
    from PIL import Image

    with readable(path, "image"), Image.open(path) as opened:
        turned = int(opened.getexif().get(ORIENTATION, 1))
        width, height = opened.size
    return (height, width, turned) if turned >= 5 else (width, height, turned)  # these exchange the sides


def facts(path: Path) -> tuple[int, int, int, str]:
    """Width, height, EXIF orientation and SHA-256 of an image file, remembered until the file changes."""
    about = path.stat()
    return _facts(path, about.st_size, about.st_mtime_ns)


@cache
def _facts(path: Path, size: int, changed: int) -> tuple[int, int, int, str]:  # size and time are keys of the cache
    return *size_of_file(path), sha256(path)


def check_single(path: Path, opened: ImageFile) -> None:
    """Raise `UserError` for an animation. Of an MPO, as telephones write, the first picture is the photograph."""
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":
        raise UserError(f"{path}: holds {frames} pictures, and one is needed; save each in a file of its own")


def white_of(opened: ImageFile) -> int:
    """The number that a PGM or PPM says is white, where Pillow stretches the pixels; 0 for other files."""
    codec, _, _, about = opened.tile[0] if opened.tile else ("", None, 0, ())
    return int(about[1]) if codec in ("ppm", "ppm_plain") and isinstance(about, tuple) and len(about) > 1 else 0


def unstretched(shown: Image, white: int) -> ndarray:
    """Deep pixels in the numbers of their file: Pillow stretches those of a PGM to 65535."""
    import numpy as np

    pixels: ndarray = np.asarray(shown)
    return np.rint(pixels * (white / 65535)).astype(pixels.dtype) if white else pixels


def deep_mode(path: Path, opened: ImageFile) -> str:
    """The mode of an image with more than 8 bits a channel, in Pillow or in the file; empty for 8 bits or less.

    Raises `UserError` for deep colours, of which Pillow drops half.
    """
    raw = next((str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in opened.tile), opened.mode)
    deep = next((mode for mode in (opened.mode, raw) if mode.startswith(("I", "F")) or ";16" in mode), "")
    if (white := white_of(opened)) > 255:
        deep = f"{opened.mode} up to {white}"
    if deep and not opened.mode.startswith(("I", "F")):
        raise UserError(f"{path}: {deep} holds more than 8 bits a pixel; scale it to 8, or save it as TIFF")
    return deep


def relabelled(split: Split, numbers: Sequence[int]) -> Split:
    """Give class `i` of a split the number `numbers[i]`; examples are still opened at each access."""
    if list(numbers[: len(split.classes)]) == list(range(len(split.classes))):
        return split
    train, held_out = (
        Lazily(range(len(part)), partial(_renumbered, part, numbers)) for part in (split.train, split.held_out)
    )
    return replace(split, train=train, held_out=held_out)


def _renumbered(part: Sequence[Example], numbers: Sequence[int], place: int) -> Example:
    import numpy as np

    example, new = part[place], np.asarray(numbers, np.int64)
    label = None if example.label is None else numbers[example.label]
    labels, crowds = (None if old is None else new[old] for old in (example.labels, example.crowd_labels))
    return replace(example, label=label, labels=labels, crowd_labels=crowds)


def numbers_of(classes: Sequence[str], names: Sequence[Sequence[str]]) -> list[int] | None:
    """Find the output that stands for each class by name; None where no class is among the `names` of the outputs.

    Classes that are called 0 to the last output, as in ImageNetV2, are these outputs: as texts 10 comes before 2.
    Raises `UserError` where only some classes have an output, where several outputs share a name (ImageNet has two
    cranes), and where two classes have one output.
    """
    outputs: dict[str, list[int]] = {}
    for number, called in enumerate(names):
        for name in {name.lower() for name in called}:
            outputs.setdefault(name, []).append(number)
    known = {name: outputs.get(name.lower(), []) for name in classes}
    if not any(known.values()):
        return _counted(classes, len(names))
    for name, places in known.items():
        if not places:
            raise UserError(
                f"the data's class {name!r} is none of those that its weights name, and "
                f"{next(n for n in classes if known[n])!r} is; rename it, or begin with a new head"
            )
    numbers: list[int] = []
    for name in classes:
        if len(places := known[name]) > 1:
            which = " or ".join(f"{names[i][0]!r} (output {i})" for i in places)
            raise UserError(f"the data's class {name!r} names {len(places)} outputs; call it {which}")
        numbers += places
    if twice := next((i for i, n in enumerate(numbers) if n in numbers[:i]), None):
        first = classes[numbers.index(numbers[twice])]
        raise UserError(
            f"the data's classes {first!r} and {classes[twice]!r} are both output {numbers[twice]}; join them"
        )
    return numbers


def _counted(classes: Sequence[str], outputs: int) -> list[int] | None:
    """The outputs of classes that are called by the numbers of all outputs; None for other names."""
    numbers = [int(name) for name in classes if name.isascii() and name.isdecimal()]
    alike = len(numbers) == len(classes) == outputs > 0 and set(numbers) == set(range(outputs))
    return numbers if alike else None


def make_split(
    train: Sequence[Example],
    held_out: Sequence[Example],
    shape: str,
    digest: Sequence[str],
    classes: Sequence[str] = (),
    skipped: Mapping[str, int] | None = None,
) -> Split:
    """Make a `Split` with counts; its hash covers the texts in `digest`, such as the hashes of files."""
    counts = {"train": len(train), "held_out": len(held_out), **(skipped or {})}
    return Split(train, held_out, shape, {"read": sum(counts.values()), **counts}, sha256_text(*digest), tuple(classes))

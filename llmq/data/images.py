"""What image data sets share: the example, images out of files, and the split."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmq.data.pixels import ORIENTATION, Window, as_bytes, is_tiff, range_of, read_tiff, readable
from llmq.errors import UserError
from llmq.files import sha256_text
from llmq.types import Split


@dataclass(frozen=True)
class Example:
    """An image and what is known of it.

    `image` is uint8 `(height, width, channels)`; of a super-resolution pair it is the low-resolution one and `high` the
    other. `boxes` is float32 `(n, 4)`: x0, y0, x1, y1 in pixels; `labels` int64 `(n,)` goes with it, and `areas`
    float64 `(n,)` where the annotations say how large each object is. `crowds` `(m, 4)` with `crowd_labels` are regions
    of many objects: nothing is learned from them, and what is found in them is neither right nor wrong.
    """

    name: str
    image: Any
    label: int | None = None
    boxes: Any = None
    labels: Any = None
    high: Any = None
    areas: Any = None
    crowds: Any = None
    crowd_labels: Any = None


@dataclass(frozen=True)
class Lazily(Sequence[Example]):
    """Examples that are opened each time they are asked for."""

    items: Sequence[Any]
    open: Callable[[Any], Example] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return Lazily(self.items[i], self.open) if isinstance(i, slice) else self.open(self.items[i])

    def __iter__(self) -> Iterator[Example]:
        return (self.open(item) for item in self.items)


def read_image(path: Path, channels: int = 3, window: Window | None = None) -> Any:
    """A file as uint8 `(height, width, channels)`, turned as it is shown (EXIF).

    Other numbers than bytes are read through `window`, whose ends become 0 and 255. Raises `UserError` for a file that
    cannot be read, that is deeper without a window, or that holds several images.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    image = _of_tiff(path, window) if is_tiff(path) else _by_pillow(path, channels, window)
    return in_channels(image, channels)


def in_channels(image: Any, channels: int) -> Any:
    """uint8 `(height, width)` or `(height, width, 3)` as `(height, width, channels)`; grey as Pillow has it."""
    import numpy as np
    from PIL import Image

    if image.ndim == 3 and channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))
    if image.ndim == 2:
        image = np.repeat(image[..., None], channels, axis=-1)
    return image


def _of_tiff(path: Path, window: Window | None) -> Any:
    pixels, _ = read_tiff(path)
    if len(pixels) > 1:
        raise UserError(f"{path}: holds {len(pixels)} images, and one is needed; save each in a file of its own")
    return as_bytes(pixels, window, str(path), _too_deep(f"{pixels.dtype}, {range_of(pixels)},"))[0]


def _by_pillow(path: Path, channels: int, window: Window | None) -> Any:
    import numpy as np
    from PIL import Image, ImageOps

    with readable(path, "image"), Image.open(path) as opened:
        deep, plain = _deep(opened), opened.mode.startswith(("I", "F"))
        if deep and not plain:  # Pillow drops half of such colours
            raise UserError(f"{path}: {deep} holds more than 8 bits a pixel; scale it to 8, or save it as TIFF")
        if deep and window is None:
            raise UserError(f"{path}: {_too_deep(deep)}")
        shown = ImageOps.exif_transpose(opened)
        if window is None:
            return np.asarray(shown.convert("RGB" if channels == 3 else "L"))
        pixels = np.asarray(shown if plain else shown.convert("RGB" if channels == 3 else "L"))
    return as_bytes(pixels[None], window, str(path), "")[0]


def _too_deep(what: str) -> str:
    return f"{what} holds more than 8 bits a pixel; scale it to 8 and save it again, or set window: [low, high]"


def size_of_file(path: Path) -> tuple[int, int, int]:
    """Width and height as an image is shown, off the head of its file, and its EXIF orientation (1: as stored)."""
    from PIL import Image

    with readable(path, "image"), Image.open(path) as opened:
        turned = int(opened.getexif().get(ORIENTATION, 1))
        width, height = opened.size
    return (height, width, turned) if turned >= 5 else (width, height, turned)


def _deep(opened: Any) -> str:
    """How an opened image holds its pixels, where that is more than 8 bits a channel; Pillow drops half of colours."""
    raw = next((str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) for tile in opened.tile), opened.mode)
    return next((mode for mode in (opened.mode, raw) if mode.startswith(("I", "F")) or ";16" in mode), "")


def relabelled(split: Split, numbers: Sequence[int]) -> Split:
    """The split, class `i` of its labels called `numbers[i]`; its examples are opened as before."""
    if list(numbers[: len(split.classes)]) == list(range(len(split.classes))):
        return split
    train, held_out = (
        Lazily(range(len(part)), partial(_renumbered, part, numbers)) for part in (split.train, split.held_out)
    )
    return replace(split, train=train, held_out=held_out)


def _renumbered(part: Sequence[Example], numbers: Sequence[int], place: int) -> Example:
    import numpy as np

    example = part[place]
    label = None if example.label is None else numbers[example.label]
    places: Any = np.asarray(numbers, np.int64)
    labels, crowds = (None if its is None else places[its] for its in (example.labels, example.crowd_labels))
    return replace(example, label=label, labels=labels, crowd_labels=crowds)


def numbers_of(classes: Sequence[str], names: Sequence[Sequence[str]]) -> list[int] | None:
    """The output that stands for each class by its name; None where none of them is among the `names`.

    Raises `UserError` where some are and some are not, for a name that several outputs share (ImageNet has two cranes),
    and for two classes that are one output.
    """
    known: dict[str, int] = {}
    shared: dict[str, list[int]] = {}
    for i, its in enumerate(names):
        for name in {name.lower() for name in its}:
            known[name] = i
            shared.setdefault(name, []).append(i)
    unknown = [name for name in classes if name.lower() not in known]
    if unknown and len(unknown) < len(classes):
        raise UserError(
            f"the data's class {unknown[0]!r} is none of those that its weights name, and "
            f"{next(n for n in classes if n not in unknown)!r} is; rename it, or begin with a new head"
        )
    if unknown or not classes:
        return None
    for name in classes:
        if len(outputs := shared[name.lower()]) > 1:
            which = " or ".join(f"{names[i][0]!r} (output {i})" for i in outputs)
            raise UserError(f"the data's class {name!r} names {len(outputs)} outputs; call it {which}")
    numbers = [known[name.lower()] for name in classes]
    if twice := next((i for i, n in enumerate(numbers) if n in numbers[:i]), None):
        first = classes[numbers.index(numbers[twice])]
        raise UserError(
            f"the data's classes {first!r} and {classes[twice]!r} are both output {numbers[twice]}; join them"
        )
    return numbers


def make_split(
    train: Sequence[Example],
    held_out: Sequence[Example],
    shape: str,
    digest: Sequence[str],
    classes: Sequence[str] = (),
    skipped: Mapping[str, int] | None = None,
) -> Split:
    """A `Split` with its counts; `digest` is what its hash is made of, such as the hashes of its files."""
    counts = {"train": len(train), "held_out": len(held_out), **(skipped or {})}
    return Split(train, held_out, shape, {"read": sum(counts.values()), **counts}, sha256_text(*digest), tuple(classes))

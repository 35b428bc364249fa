"""What image data sets share: the example, images out of files, and the split."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

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


def read_image(path: Path, channels: int = 3) -> Any:
    """A file as uint8 `(height, width, channels)`. Raises `UserError` for one that cannot be read or is 16-bit."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if deep := _deep(opened):
                raise UserError(f"{path}: {deep} holds more than 8 bits a pixel; scale it to 8 and save it again")
            image = np.asarray(opened.convert("RGB" if channels == 3 else "L"))
    except unreadable() as error:
        raise UserError(f"{path}: not a readable image: {str(error).splitlines()[0]}") from None
    return image.reshape(*image.shape[:2], channels)


def unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for a file that it cannot read, or that would fill the memory."""
    from PIL import Image, UnidentifiedImageError

    return UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError


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

    Raises `UserError` where some are and some are not.
    """
    known = {name.lower(): i for i, its in enumerate(names) for name in its}
    unknown = [name for name in classes if name.lower() not in known]
    if unknown and len(unknown) < len(classes):
        raise UserError(
            f"the data's class {unknown[0]!r} is none of those that its weights name, and "
            f"{next(n for n in classes if n not in unknown)!r} is; rename it, or begin with a new head"
        )
    return None if unknown or not classes else [known[name.lower()] for name in classes]


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

"""What image data sets share: the example, images out of files, and the split."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.files import sha256_text
from llmq.types import Split


@dataclass(frozen=True)
class Example:
    """An image and what is known of it.

    `image` is uint8 `(height, width, channels)`; of a super-resolution pair it is the low-resolution one and `high` the
    other. `boxes` is float32 `(n, 4)`: x0, y0, x1, y1 in pixels; `labels` int64 `(n,)` goes with it.
    """

    name: str
    image: Any
    label: int | None = None
    boxes: Any = None
    labels: Any = None
    high: Any = None


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
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path}: {opened.mode} holds more than 8 bits a pixel; scale it to 8 and save it again"
                )
            image = np.asarray(opened.convert("RGB" if channels == 3 else "L"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image: {str(error).splitlines()[0]}") from None
    return image.reshape(*image.shape[:2], channels)


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

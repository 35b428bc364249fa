"""The DRSRD1 data set as published: PNG slices of rock in folders."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llmq.data.images import Example, read_image, size_of_file
from llmq.data.pixels import Window
from llmq.errors import UserError
from llmq.files import at_home, sha256_files

Pair = tuple[Path, Path]


def read_grey(path: Path, window: Window | None = None) -> Any:
    """A slice as uint8 `(height, width, 1)`; of three equal channels one. Raises `UserError` if they are unlike."""
    image = read_image(path, 3, window)
    if (image != image[..., :1]).any():
        raise UserError(f"{path}: its colour channels are unlike, and rock is grey; save it in grey")
    return image[..., :1].copy()


def open_pair(pair: Pair, window: Window | None = None) -> Example:
    """A pair of files as an example."""
    low, high = pair
    return Example(f"{high.parent.name}/{high.name}", read_grey(low, window), high=read_grey(high, window))


def find_pairs(root: Path, part: str, subset: str, kernel: str, scale: int) -> list[Pair]:
    """The (low, high) files of one part, each with its partner and of a size that fits it.

    `sandstone2D_train_HR/0001.png` goes with `sandstone2D_train_LR_default_X4/0001x4.png`. Raises `UserError` for the
    first file that is missing, unreadable, or of another size.
    """
    folder = root / f"{subset}_{part}_HR"
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; unpack DRSRD1 there, or set path to where it is")
    lows = root / f"{subset}_{part}_LR_{kernel}_X{scale}"
    pairs = [(lows / f"{high.stem}x{scale}.png", high) for high in sorted(folder.glob("*.png"))]
    if not pairs:
        raise UserError(f"{folder}: there is no *.png in it")
    for low, high in pairs:
        if not low.is_file():
            raise UserError(f"{high}: its partner {str(low)!r} is missing; unpack that folder whole, too")
        (narrow, short), (wide, tall) = (_size(f, changed(f)) for f in (low, high))
        if (wide, tall) != (narrow * scale, short * scale):
            should = f"{narrow * scale} x {short * scale}"
            raise UserError(f"{low}: {narrow} x {short}, and {high} is {wide} x {tall}; at scale {scale} {should}")
    return pairs


def digest(files: Sequence[Path]) -> str:
    """The hash of files."""
    return _digest(tuple(files), tuple(map(changed, files)))


def changed(path: Path | None) -> int:
    """When a file, or one in a folder, was last written, 0 if it is not there.

    Every stage asks for its data again: what is read is kept.
    """
    path = path and at_home(path)
    if path is None or not path.exists():
        return 0
    return max(
        [path.stat().st_mtime_ns, *(f.stat().st_mtime_ns for f in path.iterdir())]
        if path.is_dir()
        else [path.stat().st_mtime_ns]
    )


@cache
def _digest(files: tuple[Path, ...], when: tuple[int, ...]) -> str:
    return sha256_files(files)


@cache
def _size(path: Path, when: int) -> tuple[int, int]:
    width, height, _ = size_of_file(path)
    return width, height

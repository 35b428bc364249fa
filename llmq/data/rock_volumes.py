"""Volumes of micro-CT, their registered partners, and the slices of both."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmq.data.images import Example, unreadable
from llmq.errors import UserError

SUFFIXES = (".npz", ".tif", ".tiff")


def read_volumes(path: Path, partner: Path | None) -> tuple[Any, Any | None]:
    """The high-resolution volume, and its registered low-resolution partner if there is one: uint8 `(z, y, x)`.

    In an .npz they are called `hr` and `lr`; an .npz with a single array holds the high-resolution one.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    high, low = _npz(path, ("hr", "lr")) if path.suffix == ".npz" else (_tif(path), None)
    if partner is not None:
        if not partner.is_file():
            raise UserError(f"{path}: its partner {str(partner)!r} is missing")
        low = _npz(partner, ("lr", "hr"))[0] if partner.suffix == ".npz" else _tif(partner)
    return high, low


def _npz(path: Path, names: Sequence[str]) -> tuple[Any, Any | None]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz of arrays: {str(error).splitlines()[0]}") from None
    if len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if names[0] not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; call the volume {names[0]!r}")
    wanted = [arrays.get(name) for name in names]
    for name, array in zip(names, wanted, strict=True):
        if array is not None and (array.dtype != np.uint8 or array.ndim != 3):
            raise UserError(f"{path}: {name!r} is {array.dtype}{array.shape}; scale it to uint8 (z, y, x)")
    return wanted[0], wanted[1]


def _tif(path: Path) -> Any:
    import numpy as np
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as opened:
            frames = [(frame.mode, np.asarray(frame)) for frame in ImageSequence.Iterator(opened)]
    except unreadable() as error:
        raise UserError(f"{path}: not a readable image: {str(error).splitlines()[0]}") from None
    for number, (mode, frame) in enumerate(frames):
        if mode != "L" or frame.shape != frames[0][1].shape:
            raise UserError(
                f"{path}: slice {number} is {mode} {frame.shape}, the first {frames[0][1].shape}; "
                "save all in 8-bit grey (L) of one size"
            )
    return np.stack([frame for _, frame in frames])


def check_partner(where: str, high: Any, low: Any, scale: int, across_z: bool = True) -> None:
    """Raise `UserError` unless `low` is `scale` times smaller in y and x, and in z so or, cut across z, as deep."""
    fits = [(low.shape[0] * z, low.shape[1] * scale, low.shape[2] * scale) for z in (scale, *([1] if across_z else []))]
    if high.shape not in fits:
        raise UserError(
            f"{where}: low is {low.shape} and high {high.shape} (z, y, x); at scale {scale} high should be {fits[0]}"
        )


def cut(high: Any, low: Any | None, begin: int, end: int, scale: int) -> tuple[Any, Any | None]:
    """Both volumes from `begin` to `end` along x, in high-resolution pixels, drawn in to whole low-resolution ones."""
    begin, end = -(-begin // scale), end // scale
    return high[..., begin * scale : end * scale], None if low is None else low[..., begin:end]


def slices(
    high: Any, low: Any | None, scale: int, across: str, name: str, lower: Callable[[Any, int], Any]
) -> list[Example]:
    """Every slice across z or y with its low-resolution partner, or what `lower(slice, number)` makes of it.

    A thick low-resolution slice goes with the high-resolution one in its middle.
    """
    if across == "y":
        high, low = high.swapaxes(0, 1), None if low is None else low.swapaxes(0, 1)
    height, width = (side // scale * scale for side in high.shape[1:])
    if not (height and width):
        raise UserError(f"{name}: slices across {across} are {high.shape[1:]}, smaller than scale {scale}; cut others")
    thickness = 1 if low is None else len(high) // len(low)
    examples = []
    for number in range(len(high) // thickness):
        image = high[number * thickness + thickness // 2, :height, :width, None]
        small = lower(image, number) if low is None else low[number, ..., None]
        examples.append(Example(f"{name} {across} {number}", small, high=image))
    return examples

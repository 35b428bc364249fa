"""Pixels as files store them (depth, sign, planes, slices, orientation), and the window that makes bytes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError, is_of_machine
from llmq.guarded.files import check_plain
from llmq.terminal import say

if TYPE_CHECKING:
    from numpy import ndarray
    from tifffile import TiffFile, TiffPage, TiffPageSeries

Window = tuple[float, float]
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, in both byte orders
PLAIN = (0, 1, 2)
"""The photometric interpretations of plain numbers: white is 0, black is 0, red-green-blue."""
ORIENTATION = 274  # the tag of TIFF and EXIF
NODATA = 42113  # the tag of GDAL


def check_window(window: Window | None, name: str = "window") -> None:
    """Raise `UserError` for a window whose first number is not below the second."""
    if window and not window[0] < window[1]:
        raise UserError(f"{name} {list(window)}: its first number is to be below its second")


def is_tiff(path: Path) -> bool:
    """True if a file begins as a TIFF does; the name does not count."""
    check_plain(path)
    with path.open("rb") as file:
        return file.read(4) in TIFF


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn any error that a library raises for a broken file into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:  # most often by a damaged header
        raise UserError(f"{path}: this {what} asks for more memory than there is; is it whole?") from None
    except Exception as error:  # struct.error, KeyError, SyntaxError, zlib.error, their own …
        if is_of_machine(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable {what}: {said}; copy it again") from None


def read_tiff(path: Path) -> tuple[ndarray, bool]:
    """Read all slices of a TIFF, `(slices, height, width[, samples])` in the file's dtype, and True if it has colours.

    The descriptions of ImageJ and OME count: a stack over 4 GB has one page and many slices. Raises `UserError` for a
    file that is cut short, or whose slices are not all of one kind.
    """
    import tifffile

    with readable(path, "image"), _warnings_of_tifffile() as said, tifffile.TiffFile(path) as file:
        pixels = _pixels(path, file)
    if said:
        raise UserError(f"{path}: not a readable image: {said[0]}; copy it again, or save it anew")
    return pixels, pixels.ndim == 4


@contextmanager
def _warnings_of_tifffile() -> Iterator[list[str]]:
    """Collect the faults that tifffile logs and then ignores, such as missing slices, but no faults of a single tag."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            of_tag = any(name in record.getMessage() for name in ("TiffTag", "GDAL_NODATA"))
            if record.levelno >= logging.WARNING and not of_tag:
                said.append(" ".join(record.getMessage().split())[:200])

    logger, handler = logging.getLogger("tifffile"), Listening()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _pixels(path: Path, file: TiffFile) -> ndarray:
    import numpy as np

    series = file.series[0]
    if len(file.series) > 1:
        kinds = " and ".join(f"{s.dtype}{s.shape}" for s in file.series[:2])
        raise UserError(
            f"{path}: slice {len(series.pages)} is unlike the first ({kinds}); save all in 8-bit grey (L) of one size"
        )
    _check_whole(path, file.filehandle.size, series)
    page = series.keyframe
    axes = [a for a, n in zip(series.axes, series.shape, strict=True) if a not in "YXS" and n > 1]
    if len(axes) > 1:
        raise UserError(f"{path}: its slices lie along {' and '.join(axes)} ({series.shape}); save one stack (Z)")
    pixels = _decoded(path, series, page)
    if pixels is None:  # tifffile cannot unpack it, and Pillow may; Pillow turns what it reads, and makes black 0
        return _by_pillow(path, page)
    if page.photometric == 0 and pixels.dtype.kind == "u":
        pixels = pixels.dtype.type(np.iinfo(pixels.dtype).max) - pixels
    if (padding := _nodata(page)) is not None and bool((pixels == padding).any()):
        say_padded(path.parent, f"{padding:g} (GDAL_NODATA)")
    tag = page.tags.get(ORIENTATION)
    return _turned(pixels, int(tag.value) if tag is not None else 1)


def _nodata(page: TiffPage) -> float | None:
    """The number that stands for no value; None without one, or for a text that is no number."""
    try:
        return float(page.tags[NODATA].value)
    except (KeyError, ValueError):
        return None


@cache  # once, not for each slice
def say_padded(folder: Path, value: str) -> None:
    """Tell that pixels are marked as without a value: what looks at them takes them for pore or rock."""
    say(f"{folder}: pixels of {value} are marked as without a value, and are taken as what they are; crop them off")


def _check_whole(path: Path, size: int, series: TiffPageSeries) -> None:
    """Raise `UserError` for pages that a file of `size` bytes does not hold: tifffile fills them with zeros."""
    for number, page in enumerate(series.pages):
        if page is None:
            raise UserError(f"{path}: not a readable image: slice {number} is in another file")
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or min(page.databytecounts) <= 0 or max(ends) > size:
            raise UserError(f"{path}: not a readable image: slice {number} is cut short; copy it again")
    if series.dataoffset is not None and series.dataoffset + series.nbytes > size:
        slices = f"{series.shape} {series.dtype}"
        raise UserError(f"{path}: not a readable image: it is cut short: {slices} do not fit into its {size} bytes")


def _decoded(path: Path, series: TiffPageSeries, page: TiffPage) -> ndarray | None:
    """Pixels `(slices, height, width[, 3])`; None for a file that tifffile cannot unpack or interpret."""
    import numpy as np

    if page.photometric not in PLAIN or page.bitspersample == 1:  # palettes, YCbCr, CMYK, bits
        return None
    try:
        pixels = series.asarray(squeeze=False)  # every axis keeps its letter
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return None
    axes = series.get_axes(squeeze=False)
    if "S" in axes:
        pixels = np.moveaxis(pixels, axes.index("S"), -1)
    samples = pixels.shape[-1] if "S" in axes else 1
    if samples > 4:
        raise UserError(f"{path}: has {samples} samples a pixel; save it in grey or in colour")
    pixels = pixels.reshape(-1, page.imagelength, page.imagewidth, samples)  # all other axes are slices, in their order
    if page.bitspersample < 8 and pixels.dtype == np.uint8:
        pixels = pixels * np.uint8(255 // (2**page.bitspersample - 1))
    made: ndarray = pixels[..., 0] if samples <= 2 else pixels[..., :3]  # without alpha
    return made


def _by_pillow(path: Path, page: TiffPage) -> ndarray:
    import numpy as np
    from PIL import Image, ImageSequence

    if page.bitspersample > 8 or page.sampleformat not in (0, 1):
        raise UserError(
            f"{path}: {page.bitspersample}-bit pixels packed by {page.compression.name}; "
            "install imagecodecs, or save it without compression"
        )
    mode = "L" if page.photometric in (0, 1) else "RGB"
    with Image.open(path) as opened:
        made: ndarray = np.stack([np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(opened)])
        return made


def _turned(slices: ndarray, orientation: int) -> ndarray:
    """Turn `(slices, height, width, …)` by one of EXIF's eight orientations."""
    import numpy as np

    rows, columns = 1, 2
    if orientation >= 5:
        slices = np.swapaxes(slices, rows, columns)
    # The axes to reverse, after the exchange of rows and columns.
    flips = {2: (columns,), 3: (rows, columns), 4: (rows,), 6: (columns,), 7: (rows, columns), 8: (rows,)}
    return np.flip(slices, flips[orientation]) if orientation in flips else slices


def as_bytes(pixels: ndarray, window: Window | None, where: str, otherwise: str) -> ndarray:
    """Bring pixels `(slices, …)` to uint8: unchanged, or from `window`, whose ends become 0 and 255, halves up.

    A window beyond 255 is meant for deeper files, and leaves bytes beside them unchanged: they would become black.
    Raises `UserError` for numbers that are not finite, and, with the text `otherwise`, for numbers other than bytes
    without a window.
    """
    import numpy as np

    if window is None or (pixels.dtype == np.uint8 and window[1] > 255):
        if pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * np.uint8(255)
        if pixels.dtype != np.uint8:
            raise UserError(f"{where}: {otherwise}")
        return pixels
    low, high = window
    if pixels.dtype.kind == "f" and not bool(np.isfinite(pixels).all()):
        raise UserError(f"{where}: holds numbers that are not finite; fill them first")
    made: ndarray = np.empty(pixels.shape, np.uint8)
    for i in range(len(pixels)):  # a slice at a time: float64 of a whole volume is eight times its bytes
        scaled = (pixels[i].astype(np.float64) - low) * (255 / (high - low))
        made[i] = np.floor(np.clip(scaled, 0, 255) + 0.5)
    return made


def range_of(pixels: ndarray) -> str:
    """The smallest and the largest number, for the choice of a window."""
    return f"{pixels.min()} to {pixels.max()}"

"""Pixels as a file describes them: depth, sign, planes, slices, orientation; and the window that makes them bytes."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.faults import is_of_machine
from llmq.guarded.files import check_plain

Window = tuple[float, float]
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MODES = {"uint16": "I;16", "int16": "I;16S", "int32": "I", "float32": "F"}
"""What Pillow calls images of these numbers."""
PLAIN = (0, 1, 2)
"""Photometric interpretations that are numbers as they stand: white is 0, black is 0, red-green-blue."""
ORIENTATION = 274


def is_tiff(path: Path) -> bool:
    """Whether the first bytes of a file are those of a TIFF, whatever it is called."""
    check_plain(path)
    with path.open("rb") as file:
        return file.read(4) in TIFF


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """What a library raises of a file, in one line: of broken files they raise whatever they meet."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # struct.error, KeyError, SyntaxError, zlib.error, their own …
        if isinstance(error, MemoryError):  # most often its header is damaged
            raise UserError(f"{path}: this {what} asks for more memory than there is; is it whole?") from None
        if is_of_machine(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable {what}: {said}; copy it again") from None


def read_tiff(path: Path) -> tuple[Any, bool]:
    """All slices of a TIFF, `(slices, height, width[, samples])` in the numbers that it stores, and whether in colour.

    ImageJ's and OME's descriptions count: a stack over 4 GB has one page and many slices. Raises `UserError` for a file
    that is cut short, or whose slices are not all of one kind.
    """
    import tifffile

    with readable(path, "image"), _complaints() as said, tifffile.TiffFile(path) as file:
        made = _series(path, file)
    if said:
        raise UserError(f"{path}: not a readable image: {said[0]}; copy it again, or save it anew")
    return made


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What tifffile logs and goes on from, as with fewer slices; not what it says of a single tag."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and "TiffTag" not in record.getMessage():
                said.append(" ".join(record.getMessage().split())[:200])

    logger, handler = logging.getLogger("tifffile"), Listening()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _series(path: Path, file: Any) -> tuple[Any, bool]:
    import numpy as np

    series = file.series[0]
    if len(file.series) > 1:
        kinds = " and ".join(f"{s.dtype}{s.shape}" for s in file.series[:2])
        raise UserError(
            f"{path}: slice {len(series.pages)} is unlike the first ({kinds}); save all in 8-bit grey (L) of one size"
        )
    _check_whole(path, file, series)
    page = series.keyframe
    axes = [a for a, n in zip(series.axes, series.shape, strict=True) if a not in "YXS" and n > 1]
    if len(axes) > 1:
        raise UserError(f"{path}: its slices lie along {' and '.join(axes)} ({series.shape}); save one stack (Z)")
    pixels = _decoded(path, series, page)
    if pixels is None:  # what tifffile cannot unpack, Pillow may; it turns what it reads, and makes black 0
        pixels = _by_pillow(path, page)
        return pixels, pixels.ndim == 4
    if page.photometric == 0 and pixels.dtype.kind == "u":
        pixels = pixels.dtype.type(np.iinfo(pixels.dtype).max) - pixels
    tag = page.tags.get(ORIENTATION)
    return turn(pixels, int(tag.value) if tag is not None else 1, 1), pixels.ndim == 4


def _check_whole(path: Path, file: Any, series: Any) -> None:
    """Raise `UserError` for pages that are not in the file: tifffile fills them with zeros."""
    size = file.filehandle.size
    for number, page in enumerate(series.pages):
        if page is None:
            raise UserError(f"{path}: not a readable image: slice {number} is in another file")
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or min(page.databytecounts) <= 0 or max(ends) > size:
            raise UserError(f"{path}: not a readable image: slice {number} is cut short; copy it again")
    if series.dataoffset is not None and series.dataoffset + series.nbytes > size:
        slices = f"{series.shape} {series.dtype}"
        raise UserError(f"{path}: not a readable image: it is cut short: {slices} do not fit into its {size} bytes")


def _decoded(path: Path, series: Any, page: Any) -> Any:
    """Pixels `(slices, height, width)`, or with samples last; None for what tifffile cannot unpack or interpret."""
    import numpy as np

    height, width = page.imagelength, page.imagewidth
    if page.photometric not in PLAIN or page.bitspersample == 1:  # palettes, YCbCr, CMYK, bits
        return None
    try:
        pixels = series.asarray(squeeze=False)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        return None
    # squeeze=False: every axis has its letter; samples are brought to the end, the rest are slices in their order.
    axes = series.get_axes(squeeze=False)
    if "S" in axes:
        pixels = np.moveaxis(pixels, axes.index("S"), -1)
    samples = pixels.shape[-1] if "S" in axes else 1
    pixels = pixels.reshape(-1, height, width, samples)
    if page.bitspersample < 8 and pixels.dtype == np.uint8:
        pixels = pixels * np.uint8(255 // (2**page.bitspersample - 1))
    return _without_alpha(path, pixels)


def _by_pillow(path: Path, page: Any) -> Any:
    import numpy as np
    from PIL import Image, ImageSequence

    if page.bitspersample > 8 or page.sampleformat not in (0, 1):
        raise UserError(
            f"{path}: {page.bitspersample}-bit pixels packed by {page.compression.name}; "
            "install imagecodecs, or save it without compression"
        )
    frames = []
    with Image.open(path) as opened:
        for frame in ImageSequence.Iterator(opened):
            frames.append(np.asarray(frame.convert("L" if page.photometric in (0, 1) else "RGB")))
    return np.stack(frames)


def _without_alpha(path: Path, pixels: Any) -> Any:
    """Grey `(…)` of one sample or of grey and alpha, colour `(…, 3)` of three or four."""
    samples = pixels.shape[-1]
    if samples > 4:
        raise UserError(f"{path}: has {samples} samples a pixel; save it in grey or in colour")
    return pixels[..., 0] if samples <= 2 else pixels[..., :3]


def turn(pixels: Any, orientation: int, rows: int) -> Any:
    """Pixels as they are shown, by EXIF's eight orientations; `rows` is the axis of the rows, columns follow."""
    import numpy as np

    columns = rows + 1
    if orientation >= 5:
        pixels = np.swapaxes(pixels, rows, columns)
    # After the exchange of axes: which of the two begin at their other end.
    flips = {2: (columns,), 3: (rows, columns), 4: (rows,), 6: (columns,), 7: (rows, columns), 8: (rows,)}
    return np.flip(pixels, flips[orientation]) if orientation in flips else pixels


def as_bytes(pixels: Any, window: Window | None, where: str, otherwise: str) -> Any:
    """Pixels `(slices, …)` as uint8: as they are, or from `window`, whose ends become 0 and 255, halves up.

    Raises `UserError`, in words of `otherwise`, for other numbers than bytes without a window, and for numbers that are
    not finite.
    """
    import numpy as np

    if window is None:
        if pixels.dtype == np.bool_:
            return pixels.astype(np.uint8) * np.uint8(255)
        if pixels.dtype != np.uint8:
            raise UserError(f"{where}: {otherwise}")
        return pixels
    low, high = window
    if pixels.dtype.kind == "f" and not bool(np.isfinite(pixels).all()):
        raise UserError(f"{where}: holds numbers that are not finite; fill them first")
    made = np.empty(pixels.shape, np.uint8)
    for i in range(len(pixels)):  # a slice at a time: float64 of a whole volume is eight times its bytes
        scaled = (pixels[i].astype(np.float64) - low) * (255 / (high - low))
        made[i] = np.floor(np.clip(scaled, 0, 255) + 0.5)
    return made


def range_of(pixels: Any) -> str:
    """The smallest and the largest number, to choose a window by."""
    return f"{pixels.min()} to {pixels.max()}"


def by_number(paths: Sequence[Path]) -> list[Path]:
    """Files in the order of the numbers in their names: slice_2 before slice_10."""
    return sorted(paths, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])

"""Slices of DICOM files in their own numbers (Hounsfield units where the file says how), with the size of voxels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError
from llmq.vision.pixels import readable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy import ndarray
    from pydicom import Dataset

BEGIN = 128, b"DICM"
"""The place and the letters by which a file is known; its name does not count."""


@dataclass(frozen=True)
class Scan:
    """The pixels of a file `(slices, height, width)`, and the size of a voxel in mm, None where it is not told."""

    pixels: ndarray
    width: float | None
    height: float | None
    depth: float | None


def is_dicom(path: Path) -> bool:
    """True for a file with the preamble of DICOM."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(BEGIN[0])
        return file.read(4) == BEGIN[1]


def read_dicom(path: Path) -> Scan:
    """Read all frames; raises `UserError` for colours, for what cannot be unpacked, and without pydicom."""
    with readable(path, "DICOM file"):
        held = _opened(path)
        if int(held.get("SamplesPerPixel", 1)) != 1 or held.get("PhotometricInterpretation") == "PALETTE COLOR":
            raise UserError(f"{path}: is in colour, and grey is needed")
        pixels = _rescaled(held)
        down, across = (float(mm) for mm in held.get("PixelSpacing", None) or (0, 0))
        depth = float(held.get("SpacingBetweenSlices", None) or held.get("SliceThickness", None) or 0)
    return Scan(pixels.reshape(-1, *pixels.shape[-2:]), across or None, down or None, depth or None)


def in_order(files: Sequence[Path]) -> list[Path]:
    """The files of a series by position along the normal of their slices, else by their numbers, else as they are."""
    import numpy as np

    places: list[tuple[float, Path]] = []
    for file in files:
        with readable(file, "DICOM file"):
            held = _opened(file, stop_before_pixels=True)
            place = held.get("ImagePositionPatient", None)
            rows = held.get("ImageOrientationPatient", None) or (1, 0, 0, 0, 1, 0)  # axial
            across = np.cross(*(np.array(each, float) for each in (rows[:3], rows[3:])))  # the normal of a slice
            number = np.dot(across, np.array(place, float)) if place else held.get("InstanceNumber", None)
        if number is None:
            return list(files)
        places.append((float(number), file))
    return [file for _, file in sorted(places, key=lambda each: each[0])]


def _opened(path: Path, **how: bool) -> Any:
    if find_spec("pydicom") is None:
        raise UserError(f"{path}: is DICOM; pip install 'llmq-suite[dicom]'")
    import pydicom

    return pydicom.dcmread(path, **how)


def _rescaled(held: Dataset) -> ndarray:
    """Stored numbers through slope and intercept; whole ones stay whole. White is made the largest number."""
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom cuts pixels off that the sizes in the head leave over
        stored: ndarray = held.pixel_array
    if held.PhotometricInterpretation == "MONOCHROME1":  # its least number is white
        ends = np.iinfo(stored.dtype)
        bits = int(held.BitsStored)
        stored = (2**bits - 1 if ends.min == 0 else -1) - stored
    slope, intercept = float(held.get("RescaleSlope", 1)), float(held.get("RescaleIntercept", 0))
    if (slope, intercept) == (1, 0):
        return stored
    made: ndarray = stored * slope + intercept
    if not (slope.is_integer() and intercept.is_integer()):
        return made.astype(np.float32)
    fits = np.iinfo(np.int16).min <= made.min() and made.max() <= np.iinfo(np.int16).max
    return made.astype(np.int16 if fits else np.int32)

"""Slices of DICOM files in their own numbers (Hounsfield units where the file says how), with the size of voxels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from statistics import median_low
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError
from llmq.vision.pixels import readable, say_padded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy import ndarray
    from pydicom import Dataset

BEGIN = 128, b"DICM"
"""The place and the letters by which a file is known; its name does not count."""
MEASURES = ("PixelSpacing", "SpacingBetweenSlices", "SliceThickness")


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
        stored = _stored(held)
        if _is_padded(held, stored):
            say_padded(path.parent, f"{held.PixelPaddingValue} (PixelPaddingValue)")
        pixels = _rescaled(held, stored)[_order(path, held)]
        measures = [_told(held, "PixelMeasuresSequence", name)[0] for name in MEASURES]
        down, across = (float(mm) for mm in measures[0] or (0, 0))
        depth = float(measures[1] or measures[2] or 0)
    return Scan(pixels, across or None, down or None, depth or None)


def _told(held: Dataset, group: str, name: str) -> list[Any]:
    """A value for each frame: of its own functional groups, else of those that frames share, else of the file."""
    count = int(held.get("NumberOfFrames", None) or 1)
    shared = list(held.get("SharedFunctionalGroupsSequence", None) or [])[:1]
    own = list(held.get("PerFrameFunctionalGroupsSequence", None) or [])
    if own and len(own) != count:
        raise ValueError(f"it has {count} frames, and functional groups of {len(own)}")
    told = []
    for frame in range(count):
        groups = [(each.get(group, None) or [{}])[0] for each in own[frame : frame + 1] + shared]
        values = [each.get(name, None) for each in (*groups, held)]
        told.append(next((value for value in values if value is not None), None))
    return told


def _order(path: Path, held: Dataset) -> list[int]:
    """The frames by position along the normal, if each frame tells its own; else as they are."""
    places = _told(held, "PlanePositionSequence", "ImagePositionPatient")
    rows = _told(held, "PlaneOrientationSequence", "ImageOrientationPatient")
    frames = list(range(len(places)))
    if "PerFrameFunctionalGroupsSequence" not in held or None in places:
        return frames
    depths = [_along(*each) for each in zip(places, rows, strict=True)]
    _check_even(str(path), depths, " mm")
    return sorted(frames, key=depths.__getitem__)


def _along(place: Sequence[float], rows: Sequence[float] | None) -> float:
    """The position of a slice along its normal, in mm; axial where `rows` does not say otherwise."""
    import numpy as np

    rows = rows or (1, 0, 0, 0, 1, 0)
    return float(np.dot(np.cross(*(np.array(each, float) for each in (rows[:3], rows[3:]))), np.array(place, float)))


def _check_even(where: str, places: Sequence[float], unit: str = "") -> None:
    """Raise `UserError` for two slices at one place, which are of two series, and for a gap between slices."""
    for one, other in pairwise(sorted(places)):
        if other - one < 1e-6:
            raise UserError(f"{where}: two slices lie at {one:g}{unit}; keep one series, without the others")
    if lacking := gap(places, unit):
        raise UserError(f"{where}: {lacking}; add what is missing, or keep a part without a gap")


def gap(places: Sequence[float], unit: str = "") -> str:
    """The words for the first two slices that are not as far apart as most; empty for an even series.

    Places that scanners write scatter a little: a tenth of the usual distance is no gap.
    """
    steps = [(one, other) for one, other in pairwise(sorted(places))]
    usual = median_low(other - one for one, other in steps) if steps else 0.0
    for one, other in steps:
        if abs(other - one - usual) > usual / 10:
            return f"slices at {one:g} and {other:g}{unit} are neighbours, and most are {usual:g}{unit} apart"
    return ""


def in_order(files: Sequence[Path]) -> list[Path]:
    """The files of a series by position along the normal of their slices, else by their numbers, else as they are.

    Raises `UserError` for slices at one place or with a gap, and where only some tell their place.
    """
    places: dict[Path, float] = {}
    numbers: dict[Path, float] = {}
    for file in files:
        with readable(file, "DICOM file"):
            held = _opened(file, stop_before_pixels=True)
            if place := held.get("ImagePositionPatient", None):
                places[file] = _along(place, held.get("ImageOrientationPatient", None))
            if (number := held.get("InstanceNumber", None)) is not None:
                numbers[file] = int(number)
    if places and len(places) < len(files):
        lacking = next(file for file in files if file not in places)
        raise UserError(f"{lacking}: tells no position, and other slices beside it do; move it to another folder")
    keys = places or (numbers if len(numbers) == len(files) else {})
    _check_even(str(files[0].parent), list(keys.values()), " mm" if places else "")
    return sorted(files, key=keys.__getitem__) if keys else list(files)


def _opened(path: Path, **how: bool) -> Any:
    if find_spec("pydicom") is None:
        raise UserError(f"{path}: is DICOM; pip install 'llmq-suite[dicom]'")
    import pydicom

    return pydicom.dcmread(path, **how)


def _stored(held: Dataset) -> ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom cuts pixels off that the sizes in the head leave over
        stored: ndarray = held.pixel_array
    return stored


def _is_padded(held: Dataset, stored: ndarray) -> bool:
    """True if a stored number is one that stands for no value, be it written as a signed or an unsigned one."""
    padding = held.get("PixelPaddingValue", None)
    values = 2 ** int(held.BitsAllocated)
    return padding is not None and bool((stored.astype(int) % values == int(padding) % values).any())


def _rescaled(held: Dataset, stored: ndarray) -> ndarray:
    """Stored numbers `(frames, height, width)` through slope and intercept, of each frame where it tells its own.

    Whole numbers stay whole. White is made the largest number.
    """
    import numpy as np

    if held.PhotometricInterpretation == "MONOCHROME1":  # its least number is white
        ends = np.iinfo(stored.dtype)
        bits = int(held.BitsStored)
        stored = (2**bits - 1 if ends.min == 0 else -1) - stored
    stored = stored.reshape(-1, *stored.shape[-2:])
    if held.get("ModalityLUTSequence", None):
        from pydicom.pixels import apply_modality_lut

        looked_up: ndarray = np.asarray(apply_modality_lut(stored, held))
        return looked_up
    group = "PixelValueTransformationSequence"
    slope, intercept = (
        np.array([usual if told is None else float(told) for told in _told(held, group, name)])[:, None, None]
        for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )  # (frames, 1, 1) each
    if bool((slope == 1).all() and (intercept == 0).all()):
        return stored
    made: ndarray = stored * slope + intercept
    if bool((slope % 1).any() or (intercept % 1).any()):
        return made.astype(np.float32)
    fits = np.iinfo(np.int16).min <= made.min() and made.max() <= np.iinfo(np.int16).max
    return made.astype(np.int16 if fits else np.int32)

"""Volumes of micro-CT, their registered partners, and the slices of both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError
from llmq.files import at_home
from llmq.guarded.files import check_plain
from llmq.terminal import say
from llmq.vision import rasters
from llmq.vision.dicom import gap, in_order, is_dicom, read_dicom
from llmq.vision.images import Example, read_image
from llmq.vision.pixels import Window, as_bytes, is_tiff, range_of, read_tiff, readable
from llmq.vision.rasters import VOXEL_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy import ndarray

SUFFIXES = (".npz", ".tif", ".tiff", ".nc", ".raw", ".dcm")
SLICES = (".tif", ".tiff", ".png", ".bmp", ".pgm", ".dcm")
PICTURES = (".png", ".bmp", ".pgm")
CUBE = 64
ALIKE = 0.3
"""The least correlation of a volume with its partner that passes without a word; a registered scan has about 0.85."""
UNWRITTEN = 9.969209968386869e36
"""What NetCDF puts where floats were never written."""
HDF5 = b"\x89HDF"
MODES = {"uint16": "I;16", "int16": "I;16S", "int32": "I", "float32": "F"}
"""Pillow's names for images of these numbers."""


@dataclass(frozen=True)
class Reading:
    """The window that makes bytes of a volume's numbers, and shape and dtype of a file of bare numbers."""

    window: Window | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None


def check_dtype(dtype: str | None) -> None:
    """Raise `UserError` for a dtype that is no kind of numbers."""
    import numpy as np

    try:
        numbers = dtype is None or np.dtype(dtype).kind in "iuf"
    except TypeError:
        numbers = False
    if not numbers:
        raise UserError(f"dtype {dtype!r} is no kind of numbers; write uint8, <u2, >i2, <f4, …")


def is_volume(path: Path) -> bool:
    """True for a file with the suffix of a volume, in any case, or a folder with slices."""
    folder = at_home(path)
    if folder.is_dir():
        return not any(folder.glob("*_HR")) and bool(files_of(folder))
    return path.suffix.lower() in SUFFIXES


def files_of(path: Path) -> list[Path]:
    """The file itself, or the slices directly in a folder in the order of their numbers: slice_2 before slice_10."""
    if not path.is_dir():
        return [path]
    files = [p for p in path.iterdir() if p.suffix.lower() in SLICES and not p.name.startswith(".") and p.is_file()]
    return sorted(files, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])


def read_volumes(path: Path, partner: Path | None, how: Reading, of_partner: Reading) -> tuple[ndarray, ndarray | None]:
    """The high-resolution volume, and the registered low-resolution partner if there is one: uint8 `(z, y, x)`.

    In an .npz or NetCDF file the arrays are named `hr` and `lr`; a single array may have any name.
    """
    high, low = _read(path, {"hr": how, "lr": of_partner})
    if partner is not None:
        if not partner.exists():
            raise UserError(f"{path}: its partner {str(partner)!r} is missing")
        low, _ = _read(partner, {"lr": of_partner})
    return high, low


def read_scan(path: Path, how: Reading) -> ndarray:
    """A scan alone, uint8 `(z, y, x)`: a volume, in files of several arrays the one named `lr`, or one picture."""
    if path.suffix.lower() in PICTURES and not path.is_dir():
        return read_image(path, 1, how.window)[None, ..., 0]
    return _read(path, {"lr": how})[0]


def _read(path: Path, hows: Mapping[str, Reading]) -> tuple[ndarray, ndarray | None]:
    """The first array that `hows` names, and the one named `lr`; a file of one array is read as the first."""
    suffix, how = path.suffix.lower(), next(iter(hows.values()))
    if path.is_dir():
        return _folder(path, how), None
    check_plain(path)
    if suffix == ".raw":
        return _raw(path, how), None
    if suffix in (".npz", ".nc"):
        return _named(path, _npz(path) if suffix == ".npz" else _netcdf(path), hows)
    if is_dicom(path):
        return _bytes(read_dicom(path).pixels, how, f"{path}: it"), None
    return _tif(path, how), None


def voxel_size(path: Path, low: bool = False) -> float | None:
    """The micrometres that a voxel is wide, if the file says: a TIFF, a DICOM file, or the `voxel_size` of an .npz.

    Of a file of pairs that is a voxel of the high-resolution volume, or of the `low` one if asked.
    """
    first = files_of(path)[0]
    if is_tiff(first):
        return rasters.voxel_size(first)
    if is_dicom(first):
        scan = read_dicom(first)
        return 1000 * scan.width if scan.width and scan.width == scan.height else None
    return rasters.voxel_size_of_npz(first, low) if first.suffix.lower() == ".npz" else None


def _npz(path: Path) -> dict[str, ndarray]:
    import numpy as np

    with readable(path, ".npz of arrays"), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != VOXEL_SIZE}


def _netcdf(path: Path) -> dict[str, ndarray]:
    """The arrays of three axes in a NetCDF file; of version 4, which is HDF5, where h5py is installed."""
    import numpy as np

    with path.open("rb") as file:
        is_hdf5 = file.read(4) == HDF5
    with readable(path, "NetCDF file"):
        if is_hdf5:
            if find_spec("h5py") is None:
                raise UserError(f"{path}: is NetCDF-4 (HDF5); pip install h5py, or convert it with nccopy -k classic")
            import h5py

            with h5py.File(path, "r") as file:
                return {n: _meant(np.asarray(v), v.attrs) for n, v in file.items() if getattr(v, "ndim", 0) == 3}
        from scipy.io import netcdf_file

        with netcdf_file(str(path), "r", mmap=False) as file:
            volumes = {name: v for name, v in file.variables.items() if len(v.shape) == 3}
            return {name: _meant(np.asarray(v.data), vars(v)) for name, v in volumes.items()}


def _meant(array: ndarray, told: Mapping[str, Any]) -> ndarray:
    """Stored numbers as attributes of NetCDF mean them: `_Unsigned` whole ones, and packed ones unpacked.

    Voxels without a value are masked.
    """
    import numpy as np

    unsigned = told.get("_Unsigned", "")
    if str(unsigned.decode() if isinstance(unsigned, bytes) else unsigned).lower() == "true":
        array = array.view(array.dtype.str.replace("i", "u"))
    array = _masked(array, told)
    scale, offset = (
        float(np.ravel(told.get(name, usual))[0]) for name, usual in (("scale_factor", 1), ("add_offset", 0))
    )
    if (scale, offset) == (1, 0):
        return array
    made: ndarray = array.astype(np.result_type(array, np.float32)) * scale + offset
    return made


def _masked(array: ndarray, told: Mapping[str, Any]) -> ndarray:
    """The array, with a mask where it holds what stands for no value; stored numbers are meant, before unpacking."""
    import numpy as np

    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    for name, usual in (("_FillValue", UNWRITTEN if kind == "f" else ()), ("missing_value", ())):
        marks: ndarray = np.ravel(told.get(name, usual))
        for mark in marks.tolist() if marks.dtype.kind in "iuf" else []:
            stored = mark % 2**bits if kind == "u" else mark  # one of unsigned numbers may be written as a signed one
            if bool((lacking := array == stored).any()):
                array = np.ma.masked_where(lacking, array)
    return array


def _named(path: Path, arrays: dict[str, ndarray], hows: Mapping[str, Reading]) -> tuple[ndarray, ndarray | None]:
    first = next(iter(hows))
    if len(arrays) == 1:
        arrays = {first: next(iter(arrays.values()))}
    if first not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; call the volume {first!r}")
    volumes = {name: arrays[name] for name in hows if name in arrays}
    for name, array in volumes.items():
        if array.ndim != 3:
            raise UserError(f"{path}: {name!r} is {array.dtype}{array.shape}; scale it to uint8 (z, y, x)")
    made = {name: _bytes(array, hows[name], f"{path}: {name!r}") for name, array in volumes.items()}
    return made[first], made.get("lr")


def _bytes(array: ndarray, how: Reading, where: str) -> ndarray:
    import numpy as np

    kind, about = array.dtype.kind, f"{array.dtype}{array.shape}"
    if isinstance(array, np.ma.MaskedArray):
        lacking = f"{int(np.ma.getmaskarray(array).sum())} of {array.size} voxels are marked as without a value"
        raise UserError(f"{where}: {lacking} (_FillValue, missing_value); crop the volume, or fill them first")
    if kind not in "biuf":
        raise UserError(f"{where} is {about}, and numbers are needed")
    if not how.window and str(array.dtype) != "uint8":
        holds = f" (it holds {range_of(array)})" if kind in "iuf" and array.size else ""
        raise UserError(f"{where} is {about}; scale it to uint8 (z, y, x), or set window: [low, high]{holds}")
    return as_bytes(array, how.window, where, "")


def _tif(path: Path, how: Reading) -> ndarray:
    pixels, in_colour = read_tiff(path)
    mode = "RGB" if in_colour else MODES.get(str(pixels.dtype), str(pixels.dtype))
    cure = "save all in 8-bit grey (L) of one size"
    if in_colour:
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: slice 0 is {mode}, its channels unlike, and rock is grey; {cure}")
        pixels = pixels[..., 0]
    deep = f"slice 0 is {mode} ({pixels.dtype}, {range_of(pixels)}); set window: [low, high], or {cure}"
    return as_bytes(pixels, how.window, str(path), deep)


def _folder(path: Path, how: Reading) -> ndarray:
    import numpy as np

    files = files_of(path)
    if not files:
        raise UserError(f"{path}: there is no slice in it ({', '.join(SLICES)})")
    kinds = sorted({file.suffix.lower().replace(".tiff", ".tif") for file in files})
    if len(kinds) > 1:  # masks or copies beside the slices would be slices among them
        raise UserError(f"{path}: holds {' and '.join(kinds)}, and the slices of one volume are of one kind; part them")
    if is_dicom(files[0]):
        files = in_order(files)
    elif lacking := gap(_numbers_in([file.stem for file in files])):
        say(f"{path}: by their names, {lacking}; is one missing?")
    first = read_image(files[0], 1, how.window)
    volume: ndarray = np.empty((len(files), *first.shape[:2]), np.uint8)
    for number, file in enumerate(files):
        image = read_image(file, 1, how.window)
        if image.shape != first.shape:
            raise UserError(
                f"{file}: is {image.shape[:2]}, and {files[0].name} {first.shape[:2]}; save all of one size"
            )
        volume[number] = image[..., 0]
    return volume


def _numbers_in(names: Sequence[str]) -> list[int]:
    """The number by which alone the names of slices differ; empty for other names."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(each) for each in parts}) > 1:
        return []
    unlike = [each for each in zip(*parts, strict=True) if len(set(each)) > 1]
    return [int(each) for each in unlike[0]] if len(unlike) == 1 and unlike[0][0].isdecimal() else []


def _raw(path: Path, how: Reading) -> ndarray:
    import numpy as np

    if how.shape is None or how.dtype is None:
        raise UserError(f"{path}: bare numbers; say shape: [z, y, x] and dtype, such as uint8, <u2 or >f4")
    dtype = np.dtype(how.dtype)
    wanted, size = int(np.prod(how.shape)) * dtype.itemsize, path.stat().st_size
    if wanted != size:
        raise UserError(f"{path}: {size} bytes, and {how.dtype} of shape {list(how.shape)} is {wanted}; correct them")
    return _bytes(np.fromfile(path, dtype).reshape(how.shape), how, f"{path}: it")


def check_partner(where: str, high: ndarray, low: ndarray, scale: int, across_z: bool = True) -> None:
    """Raise `UserError` unless `low` is `scale` times smaller in z, y and x; with `across_z` depths may be equal."""
    fits = [(low.shape[0] * z, low.shape[1] * scale, low.shape[2] * scale) for z in (scale, *([1] if across_z else []))]
    if high.shape not in fits:
        raise UserError(
            f"{where}: low is {low.shape} and high {high.shape} (z, y, x); at scale {scale} high should be {fits[0]}"
        )


def say_unlike(where: str, high: ndarray, low: ndarray, scale: int) -> None:
    """Tell of a partner whose middle slice is unlike that of the volume: turned, inverted, or of other rock."""
    import numpy as np

    middle, (rows, columns) = len(low) // 2, low.shape[1:]
    beside: ndarray = high[(2 * middle + 1) * len(high) // (2 * len(low))].astype(np.float64)
    seen = beside.reshape(rows, scale, columns, scale).mean((1, 3))  # (rows, columns), as `low`
    if np.ptp(seen) and np.ptp(low[middle]) and (alike := np.corrcoef(seen.ravel(), low[middle].ravel())[0, 1]) < ALIKE:
        say(
            f"{where}: the low and the high volume correlate by {alike:.2f} in the middle slice; are both of one rock, "
            "with their axes in one order and the same phase bright?"
        )


def cut(high: ndarray, low: ndarray | None, begin: int, end: int, scale: int) -> tuple[ndarray, ndarray | None]:
    """Both volumes from `begin` to `end` along x (high-resolution pixels), shrunk to whole low-resolution pixels."""
    begin, end = -(-begin // scale), end // scale
    return high[..., begin * scale : end * scale], None if low is None else low[..., begin:end]


def whole(
    high: ndarray, low: ndarray | None, scale: int, name: str, lower: Callable[[ndarray, int], ndarray]
) -> Example:
    """The pair of volumes, cut to whole low-resolution voxels; without a partner `lower(volume, 0)` makes it."""
    sides = [side // scale * scale for side in high.shape]
    if not all(sides):
        raise UserError(f"{name}: is {high.shape}, smaller than scale {scale}")
    image = high[: sides[0], : sides[1], : sides[2], None]  # (z, y, x, 1)
    return Example(name, lower(image, 0) if low is None else low[..., None], high=image)


def count_of_cubes(shape: Sequence[int]) -> int:
    """The number of parts that `cubes` makes of a pair whose low-resolution volume has this shape."""
    return prod(-(-side // CUBE) for side in shape)


def cubes(pair: Example, scale: int) -> list[Example]:
    """The pair in equal parts of at most `CUBE` low-resolution voxels a side: a step then draws noise for few."""
    counts = [-(-side // CUBE) for side in pair.image.shape[:-1]]
    ends = [[side * i // n for i in range(n + 1)] for side, n in zip(pair.image.shape, counts, strict=False)]
    spans = [list(itertools.pairwise(each)) for each in ends]
    parts = []
    for number, place in enumerate(itertools.product(*spans)):
        low, high = (tuple(slice(begin * k, end * k) for begin, end in place) for k in (1, scale))
        parts.append(Example(f"{pair.name} cube {number}", pair.image[low], high=pair.high[high]))
    return parts


def slices(
    high: ndarray, low: ndarray | None, scale: int, across: str, name: str, lower: Callable[[ndarray, int], ndarray]
) -> list[Example]:
    """Every slice across z or y with its low-resolution partner, or with the image that `lower(slice, number)` makes.

    A thick low-resolution slice is paired with the high-resolution slice at the middle of the same depth.
    """
    if across == "y":
        high, low = high.swapaxes(0, 1), None if low is None else low.swapaxes(0, 1)
    height, width = (side // scale * scale for side in high.shape[1:])
    if not (height and width):
        raise UserError(f"{name}: slices across {across} are {high.shape[1:]}, smaller than scale {scale}; cut others")
    thickness = 1 if low is None else len(high) // len(low)
    examples = []
    for number in range(len(high) // thickness):
        image = high[number * thickness + thickness // 2, :height, :width, None]  # (height, width, 1)
        small = lower(image, number) if low is None else low[number, ..., None]
        examples.append(Example(f"{name} {across} {number}", small, high=image))
    return examples

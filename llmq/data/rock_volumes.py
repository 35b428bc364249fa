"""Volumes of micro-CT, their registered partners, and the slices of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmq.data.images import Example
from llmq.data.pixels import MODES, Window, as_bytes, by_number, range_of, read_tiff, readable
from llmq.errors import UserError
from llmq.files import at_home
from llmq.guarded.files import check_plain

SUFFIXES = (".npz", ".tif", ".tiff", ".nc", ".raw")
SLICES = (".tif", ".tiff", ".png", ".bmp", ".pgm")
HDF5 = b"\x89HDF"


@dataclass(frozen=True)
class Reading:
    """How the numbers of a volume become bytes, and what a file of bare numbers does not say of itself."""

    window: Window | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None


def is_volume(path: Path) -> bool:
    """Whether a path is a volume: by its suffix, in any case, or as a folder with slices in it."""
    folder = at_home(path)
    if folder.is_dir():
        return not any(folder.glob("*_HR")) and bool(slices_in(folder))
    return path.suffix.lower() in SUFFIXES


def slices_in(folder: Path) -> list[Path]:
    """The image files that lie in a folder itself, in the order of their numbers."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in SLICES and not p.name.startswith(".") and p.is_file()]
    return by_number(found)


def files_of(path: Path) -> list[Path]:
    """What a volume is made of."""
    return slices_in(path) if path.is_dir() else [path]


def read_volumes(path: Path, partner: Path | None, how: Reading, of_partner: Reading) -> tuple[Any, Any | None]:
    """The high-resolution volume, and its registered low-resolution partner if there is one: uint8 `(z, y, x)`.

    In an .npz or NetCDF they are called `hr` and `lr`; one with a single array holds the high-resolution one.
    """
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}")
    high, low = _read(path, ("hr", "lr"), how)
    if partner is not None:
        if not partner.exists():
            raise UserError(f"{path}: its partner {str(partner)!r} is missing")
        low = _read(partner, ("lr", "hr"), of_partner)[0]
    return high, low


def _read(path: Path, names: Sequence[str], how: Reading) -> tuple[Any, Any | None]:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path, how), None
    check_plain(path)
    if suffix == ".raw":
        return _raw(path, how), None
    if suffix in (".npz", ".nc"):
        return _named(path, _npz(path) if suffix == ".npz" else _netcdf(path), names, how)
    return _tif(path, how), None


def _npz(path: Path) -> dict[str, Any]:
    import numpy as np

    with readable(path, ".npz of arrays"), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _netcdf(path: Path) -> dict[str, Any]:
    """The arrays of three axes in a NetCDF file; of version 4, which is HDF5, where h5py is installed."""
    import numpy as np

    with path.open("rb") as file:
        head = file.read(4)
    with readable(path, "NetCDF file"):
        if head == HDF5:
            if find_spec("h5py") is None:
                raise UserError(f"{path}: is NetCDF-4 (HDF5); pip install h5py, or convert it with nccopy -k classic")
            import h5py

            with h5py.File(path, "r") as file:
                return {name: np.asarray(v) for name, v in file.items() if getattr(v, "ndim", 0) == 3}
        from scipy.io import netcdf_file

        with netcdf_file(str(path), "r", mmap=False) as file:
            return {name: np.asarray(v.data) for name, v in file.variables.items() if len(v.shape) == 3}


def _named(path: Path, arrays: dict[str, Any], names: Sequence[str], how: Reading) -> tuple[Any, Any | None]:
    if len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if names[0] not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; call the volume {names[0]!r}")
    wanted = [arrays.get(name) for name in names]
    for name, array in zip(names, wanted, strict=True):
        if array is not None and array.ndim != 3:
            raise UserError(f"{path}: {name!r} is {array.dtype}{array.shape}; scale it to uint8 (z, y, x)")
    high, low = (None if a is None else _bytes(a, how, f"{path}: {n!r}") for n, a in zip(names, wanted, strict=True))
    return high, low


def _bytes(array: Any, how: Reading, where: str) -> Any:
    needed = f"{array.dtype}{array.shape}; scale it to uint8 (z, y, x), or set window: [low, high]"
    if array.dtype.kind in "iuf" and array.size:
        needed += f" (it holds {range_of(array)})"
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} is {array.dtype}{array.shape}, and numbers are needed")
    return as_bytes(array, how.window, where, f"is {needed}") if how.window else _as_they_are(array, where, needed)


def _as_they_are(array: Any, where: str, needed: str) -> Any:
    import numpy as np

    if array.dtype != np.uint8:
        raise UserError(f"{where} is {needed}")
    return array


def _tif(path: Path, how: Reading) -> Any:
    pixels, in_colour = read_tiff(path)
    mode = "RGB" if in_colour else MODES.get(str(pixels.dtype), str(pixels.dtype))
    cure = "save all in 8-bit grey (L) of one size"
    if in_colour:
        if (pixels != pixels[..., :1]).any():
            raise UserError(f"{path}: slice 0 is {mode}, its channels unlike, and rock is grey; {cure}")
        pixels = pixels[..., 0]
    deep = f"slice 0 is {mode} ({pixels.dtype}, {range_of(pixels)}); set window: [low, high], or {cure}"
    return as_bytes(pixels, how.window, str(path), deep)


def _folder(path: Path, how: Reading) -> Any:
    """The slices of a folder, in the order of the numbers in their names."""
    import numpy as np

    from llmq.data.images import read_image

    files = slices_in(path)
    first = read_image(files[0], 1, how.window)
    volume = np.empty((len(files), *first.shape[:2]), np.uint8)
    for number, file in enumerate(files):
        image = read_image(file, 1, how.window)
        if image.shape != first.shape:
            raise UserError(
                f"{file}: is {image.shape[:2]}, and {files[0].name} {first.shape[:2]}; save all of one size"
            )
        volume[number] = image[..., 0]
    return volume


def _raw(path: Path, how: Reading) -> Any:
    import numpy as np

    if how.shape is None or how.dtype is None:
        raise UserError(f"{path}: bare numbers; say shape: [z, y, x] and dtype, such as uint8, <u2 or >f4")
    dtype = np.dtype(how.dtype)
    wanted, size = int(np.prod(how.shape)) * dtype.itemsize, path.stat().st_size
    if wanted != size:
        raise UserError(f"{path}: {size} bytes, and {how.dtype} of shape {list(how.shape)} is {wanted}; correct them")
    return _bytes(np.fromfile(path, dtype).reshape(how.shape), how, f"{path}: it")


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

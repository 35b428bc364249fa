"""Pictures and volumes in the numbers of their files, read and written again in the same format.

A TIFF stays a TIFF, with its slices and the size of its voxels; `.npz` and `.npy` stay what they are; DICOM becomes a
TIFF in the file's own units; every other picture becomes a PNG, which loses nothing.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from llmq.errors import UserError
from llmq.guarded.files import check_plain
from llmq.types import JsonObject
from llmq.vision.dicom import is_dicom, read_dicom
from llmq.vision.images import check_single, deep_mode, unstretched, white_of
from llmq.vision.pixels import ORIENTATION, is_tiff, range_of, read_tiff, readable

if TYPE_CHECKING:
    from numpy import ndarray
    from tifffile import TiffFile

VOLUMES = (".npz", ".npy")
UNWRITTEN = (".raw", ".nc", ".h5", ".hdf5")
"""Volumes that data may be read from, and files like them."""
LOW, HIGH = "lr", "hr"
"""The names of the arrays in an .npz of pairs."""
VOXEL_SIZE = "voxel_size"
"""The name in an .npz of the micrometres that a voxel is wide, a high-resolution one in pairs."""
OF_IMAGEJ = ("uint8", "uint16", "float32")
OF_OME = ("int8", "int16", "int32", "uint32", "float64")
"""Those of OME that ImageJ has not."""
RESOLUTIONS = (282, 283)
UNIT = 296  # the tag of the unit of both
MICROMETRES = {"nm": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4}
"""Micrometres in each unit of length that ImageJ writes; both letters mu are in use."""
CENTIMETRES = 3
"""The unit of a TIFF's resolution that is a length. Inches are left out: they are a printer's, as 72 or 300 to one."""


@dataclass(frozen=True)
class Raster:
    """Pixels in the numbers of a file, and what the file says besides."""

    pixels: ndarray  # (slices, height, width[, 3])
    suffix: str
    key: str = ""
    """The name of the array in an .npz."""
    flat: bool = False
    """True for an array of two axes in an .npz or .npy."""
    voxels: JsonObject = field(default_factory=dict)
    """The size of pixels and slices, as tifffile writes it."""
    of_ome: bool = False
    """True for a TIFF with sizes in a description of OME that are not understood, and not written again."""
    transparent: bool = False
    """True for a file with an alpha channel or a transparent colour, which are not among the pixels."""
    voxel_size: float | None = None
    """Micrometres, as an .npz tells them."""


def read_raster(path: Path) -> Raster:
    """Read a picture, a TIFF with one or more slices, or the array of an `.npz` or `.npy`.

    Raises `UserError` for a file that cannot be read, and for numbers other than integers and floats.
    """
    check_plain(path)
    suffix = path.suffix.lower()
    if suffix in UNWRITTEN:
        raise UserError(f"{path}: a {suffix} is not enlarged into another; save the volume as .npy, .npz or .tif")
    if suffix in VOLUMES:
        raster = _of_numpy(path, suffix)
    elif is_dicom(path):
        raster = _of_dicom(path)
    elif is_tiff(path):
        voxels, of_ome = _voxels(path)
        raster = Raster(read_tiff(path)[0], ".tif", voxels=voxels, of_ome=of_ome, transparent=_is_transparent(path))
    else:
        raster = Raster(_by_pillow(path)[None], ".png", transparent=_is_transparent(path))
    if raster.pixels.dtype.kind not in "uif" or raster.pixels.dtype.itemsize > 8:
        raise UserError(f"{path}: holds {raster.pixels.dtype} numbers; save it as integers or floats, such as uint8")
    if 0 in raster.pixels.shape:
        raise UserError(f"{path}: is empty: {raster.pixels.shape}")
    return raster


def _of_numpy(path: Path, suffix: str) -> Raster:
    import numpy as np

    with readable(path, f"{suffix} of arrays"):
        held = np.load(path, allow_pickle=False, mmap_mode="r" if suffix == ".npy" else None)
        if suffix == ".npy":
            key, array = "", held
        else:
            with held as archive:
                names = [name for name in archive.files if name != VOXEL_SIZE]
                if len(names) != 1 and LOW not in names:
                    raise UserError(f"{path}: holds {', '.join(names) or 'nothing'}; call the one to enlarge {LOW!r}")
                key = LOW if LOW in names else names[0]
                array = archive[key]
    if array.ndim not in (2, 3):
        raise UserError(f"{path}: is {array.dtype}{array.shape}; a volume (z, y, x) or an image (y, x) is needed")
    voxel_size = voxel_size_of_npz(path, low=key == LOW) if suffix == ".npz" else None
    return Raster(array if array.ndim == 3 else array[None], suffix, key, array.ndim == 2, voxel_size=voxel_size)


def _of_dicom(path: Path) -> Raster:
    scan = read_dicom(path)
    width, height, depth = (1e3 * (mm or 0.0) for mm in (scan.width, scan.height, scan.depth))
    told = _written(width, height, depth, scan.pixels.dtype.name)
    return Raster(scan.pixels, ".tif", voxels=told)


def voxel_size_of_npz(path: Path, low: bool = False) -> float | None:
    """The `voxel_size` of an .npz in micrometres, of pairs that of the `low` volume if asked; None without one."""
    import numpy as np

    with readable(path, ".npz of arrays"), np.load(path, allow_pickle=False) as archive:
        told = archive[VOXEL_SIZE] if VOXEL_SIZE in archive.files else None
        of_pair = told is not None and low and {LOW, HIGH} <= set(archive.files)
        times = archive[HIGH].shape[-1] / archive[LOW].shape[-1] if of_pair else 1.0
    if told is None:
        return None
    if told.size != 1 or told.dtype.kind not in "iuf" or not 0 < float(told.item()) < float("inf"):
        raise UserError(f"{path}: {VOXEL_SIZE!r} is {told.dtype}{told.shape}; one number of micrometres is needed")
    return float(told.item()) * times


def _by_pillow(path: Path) -> ndarray:
    """The first picture of a file, turned by EXIF: uint8 `(height, width[, 3])`, or uint16 `(height, width)`."""
    import numpy as np
    from PIL import Image, ImageOps

    with readable(path, "image"), Image.open(path) as opened:
        check_single(path, opened)
        deep, white = deep_mode(path, opened), white_of(opened)
        shown = ImageOps.exif_transpose(opened)
        grey = opened.mode in ("1", "L", "LA")
        pixels = unstretched(shown, white) if deep else np.asarray(shown.convert("L" if grey else "RGB"))
    if not deep:
        return pixels
    if pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 65535:
        raise UserError(f"{path}: {deep} of {range_of(pixels)} fits into no PNG; save it as TIFF")
    return pixels.astype(np.uint16)


def _is_transparent(path: Path) -> bool:
    import tifffile
    from PIL import Image

    if is_tiff(path):
        with readable(path, "image"), tifffile.TiffFile(path) as file:
            return bool(file.pages[0].aspage().extrasamples)
    with readable(path, "image"), Image.open(path) as opened:
        return opened.has_transparency_data


def _voxels(path: Path) -> tuple[JsonObject, bool]:
    """The resolution of a TIFF, and the distance of slices that ImageJ or OME tells; True for an OME not understood."""
    import tifffile

    with readable(path, "image"), tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        told: JsonObject = {}
        if all(tag in tags for tag in RESOLUTIONS):
            across, down = (_ratio(tags[tag].value) for tag in RESOLUTIONS)
            if ORIENTATION in tags and int(tags[ORIENTATION].value) >= 5:  # these exchange the sides
                across, down = down, across
            if across and down:
                told = {"resolution": (across, down), "resolutionunit": int(tags[UNIT].value) if UNIT in tags else 1}
        of_ome = _of_ome(file) if file.is_ome else {}
        unknown = bool(file.is_ome) and not of_ome and "PhysicalSize" in (file.ome_metadata or "")
        return told | _of_imagej(file) | of_ome, unknown


def voxel_size(path: Path) -> float | None:
    """The width of a pixel of a TIFF in micrometres, if the file says it in a unit of length and height is the same."""
    told, _ = _voxels(path)
    across, down = told.get("resolution", (0.0, 0.0))
    unit = str(told.get("metadata", {}).get("unit", "")).replace("\\u00B5", "µ")  # as ImageJ writes it
    width = MICROMETRES.get(unit) or (MICROMETRES["cm"] if told.get("resolutionunit") == CENTIMETRES else None)
    alike = across > 0 and abs(across - down) <= 0.01 * across
    return width / across if width and alike else None


def _of_ome(file: TiffFile) -> JsonObject:
    """The size of voxels in the first image of a description of OME: resolution, and ImageJ's distance of slices."""
    import tifffile

    image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
    sizes = []  # micrometres, of x, y and z; 0 if unknown
    for axis in "XYZ":
        unit = MICROMETRES.get(str(pixels.get(f"PhysicalSize{axis}Unit", "µm")), 0.0)
        sizes.append(float(pixels.get(f"PhysicalSize{axis}", 0)) * unit)
    across, down, apart = (size if 0 < size < float("inf") else 0.0 for size in sizes)
    return _written(across, down, apart, file.series[0].dtype.name)


def _written(across: float, down: float, apart: float, dtype: str) -> JsonObject:
    """Voxels of a size in micrometres (0: unknown) for tifffile: ImageJ's way, or OME's for other numbers."""
    if not (across and down):
        return {}
    if apart and dtype in OF_IMAGEJ:
        metadata = {"spacing": apart, "unit": "um"}
        return {"resolution": (1 / across, 1 / down), "resolutionunit": 1, "imagej": True, "metadata": metadata}
    told: JsonObject = {"resolution": (1e4 / across, 1e4 / down), "resolutionunit": CENTIMETRES}
    if apart and dtype in OF_OME:
        metadata = {f"PhysicalSize{axis}": size for axis, size in zip("XYZ", (across, down, apart), strict=True)}
        told |= {"ome": True, "metadata": {**metadata, "UUID": str(UUID(int=0))}}  # a random one otherwise
    return told


def _of_imagej(file: TiffFile) -> JsonObject:
    said = {k: v for k, v in (file.imagej_metadata or {}).items() if k in ("spacing", "unit")}
    return {"imagej": True, "metadata": said} if said and file.series[0].dtype.name in OF_IMAGEJ else {}


def _ratio(value: tuple[int, int] | int) -> float:
    above, below = value if isinstance(value, tuple) else (value, 1)
    return float(above) / float(below) if below else 0.0


class Enlarged:
    """The pixels of an enlarged raster, on disk beside the file that they become."""

    def __init__(self, of: Raster, target: Path, scale: int, volumetric: bool = False):
        import numpy as np

        slices, height, width, *colours = of.pixels.shape
        self.of, self.target, self.scale = of, target, scale
        self.deeper = scale if volumetric else 1
        self.held = target.with_name(f".{target.name}.npy")
        shape = (slices * self.deeper, height * scale, width * scale, *colours)
        self.pixels: ndarray = np.lib.format.open_memmap(self.held, "w+", of.pixels.dtype, shape[of.flat :])
        self.slices = self.pixels[None] if of.flat else self.pixels  # (slices, height, width[, 3])

    def save(self) -> Path:
        """Write the file, and return its path; the pixels on disk are gone then."""
        import numpy as np

        self.pixels.flush()  # type: ignore[attr-defined]  # of a memmap
        if self.of.suffix == ".npy":
            self.held.rename(self.target)
            return self.target
        if self.of.suffix == ".npz":
            with zipfile.ZipFile(self.target, "w") as archive:  # a fixed time: equal arrays are equal files
                if self.of.voxel_size:
                    size = io.BytesIO()
                    np.save(size, np.float64(self.of.voxel_size / self.scale))
                    archive.writestr(zipfile.ZipInfo(f"{VOXEL_SIZE}.npy"), size.getvalue())
                about = zipfile.ZipInfo(f"{self.of.key}.npy")
                about.file_size = os.path.getsize(self.held)
                with archive.open(about, "w", force_zip64=True) as inside, self.held.open("rb") as source:
                    while part := source.read(2**24):
                        inside.write(part)
        elif self.of.suffix == ".png":
            from PIL import Image

            Image.fromarray(self.slices[0]).save(self.target)
        else:
            self._save_tiff()
        self.held.unlink()
        return self.target

    def _save_tiff(self) -> None:
        import tifffile

        voxels = {"metadata": None, **self.of.voxels}
        if "resolution" in voxels:  # pixels in a unit of length
            voxels["resolution"] = tuple(self.scale * each for each in voxels["resolution"])
        colours = self.slices.ndim == 4
        smaller = {"spacing": self.deeper, "PhysicalSizeZ": self.deeper, "PhysicalSizeX": self.scale}
        smaller["PhysicalSizeY"] = self.scale
        if told := voxels["metadata"]:
            told = {name: value / smaller[name] if name in smaller else value for name, value in told.items()}
            voxels["metadata"] = {**told, "axes": "ZYXS" if colours else "ZYX"}
        tifffile.imwrite(self.target, self.slices, photometric="rgb" if colours else "minisblack", **voxels)

"""The shapes of volumes from the heads of their files, so that a run on them is foretold before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.guarded.files import check_plain
from llmq.vision.images import size_of_file
from llmq.vision.pixels import readable
from llmq.vision.rasters import VOXEL_SIZE
from llmq.vision.volumes import PICTURES, Reading, files_of

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Sequence
    from pathlib import Path

Shape = tuple[int, int, int]
"""`(z, y, x)`"""


def shapes_of(path: Path, names: Sequence[str], how: Reading) -> tuple[Shape | None, Shape | None]:
    """The shapes of the volume and of the array beside it, named `names` where a file has several; None if unknown.

    A DICOM or NetCDF file, or one that is damaged, tells nothing until it is read.
    """
    try:
        if path.is_dir():
            files = files_of(path)
            if not files:
                return None, None
            width, height, _ = size_of_file(files[0])
            return (len(files), height, width), None
        check_plain(path)
        if path.suffix.lower() == ".raw":
            return how.shape, None
        if path.suffix.lower() in PICTURES:
            width, height, _ = size_of_file(path)
            return (1, height, width), None
        if path.suffix.lower() == ".npz":
            return _of_npz(path, names)
        return (_of_tiff(path), None) if path.suffix.lower() in (".tif", ".tiff") else (None, None)
    except UserError:
        return None, None


def _of_npz(path: Path, names: Sequence[str]) -> tuple[Shape | None, Shape | None]:
    import zipfile

    with readable(path, ".npz of arrays"), zipfile.ZipFile(path) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".npy")]
        shapes = {name.removesuffix(".npy"): _of_npy(archive, name) for name in inside}
    shapes.pop(VOXEL_SIZE, None)
    if len(shapes) == 1:
        return next(iter(shapes.values())), None
    return shapes.get(names[0]), shapes.get(names[1])


def _of_npy(archive: zipfile.ZipFile, name: str) -> Shape | None:
    from numpy.lib import format as npy

    with archive.open(name) as file:
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape = read(file)[0]
    return _three(shape)


def _of_tiff(path: Path) -> Shape | None:
    import tifffile

    with readable(path, "image"), tifffile.TiffFile(path) as file:
        return _three(file.series[0].shape[:3])


def _three(shape: Sequence[int]) -> Shape | None:
    return (int(shape[0]), int(shape[1]), int(shape[2])) if len(shape) == 3 else None

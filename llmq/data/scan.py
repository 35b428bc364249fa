"""The slices of a scan that nothing is known of but itself: no high-resolution partner, all of it held out."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq.errors import UserError
from llmq.files import at_home, sha256_files, sha256_text
from llmq.types import Data, Expected, Split
from llmq.vision import volumes
from llmq.vision.images import Example, make_split
from llmq.vision.pixels import Window, check_window


class Scan(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})
    shapes: ClassVar[frozenset[str]] = frozenset({"low"})

    path: Path = Field(description="a volume (z, y, x): .npz, .tif, .dcm, .nc, .raw, a folder of slices; or a picture")
    window: Window | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where a scan is not 8-bit"
    )
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="of a .raw volume: z, y, x")
    dtype: str | None = Field(None, description="of a .raw volume, as numpy writes it: uint8, <u2, >f4, …")
    voxel_size: PositiveFloat | None = Field(None, description="micrometres; what the scan says, if unset")
    across: Literal["z", "y"] = Field("z", description="the axis that the slices lie across")

    def check(self) -> None:
        check_window(self.window)
        volumes.check_dtype(self.dtype)
        if not at_home(self.path).exists():
            raise UserError(f"there is no file {str(self.path)!r}")

    def expected(self) -> Expected | None:
        from llmq.vision.volume_shapes import shapes_of

        path = at_home(self.path)
        if not path.exists():
            return None
        shape, _ = shapes_of(path, ("lr", "hr"), volumes.Reading(shape=self.shape))
        if shape is None:
            return None
        z, y, x = shape if self.across == "z" else (shape[1], shape[0], shape[2])
        return Expected(0, z, y * x)

    def read(self) -> Split:
        self.check()
        path = at_home(self.path)
        volume = volumes.read_scan(path, volumes.Reading(self.window, self.shape, self.dtype))
        if self.across == "y":
            volume = volume.swapaxes(0, 1)
        held_out = [Example(f"{path.name} {self.across} {i}", image[..., None]) for i, image in enumerate(volume)]
        about = self.model_dump_json(exclude={"path", "voxel_size"})
        split = make_split([], held_out, "low", [sha256_files(volumes.files_of(path)), sha256_text(about)])
        return replace(split, pixel_size=self.voxel_size or volumes.voxel_size(path, low=True), neighbours=True)

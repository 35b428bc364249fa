"""Micro-CT images of rock in two resolutions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from llmq.data.images import Example, Lazily, make_split
from llmq.errors import UserError
from llmq.files import at_home
from llmq.types import Data, Split

VOLUMES = "an .npz, .tif, .nc or .raw, or a folder of slices"


class Rock(Data):
    """Slices of rock, low and high: the DRSRD1 data set, a scanned volume, or (no path) seeded synthetic micro-CT.

    Where no low-resolution images are given they are made: by bicubic with antialiasing (`default`), or by one of
    five kernels at random (`unknown`). A volume is parted along x, with a gap between.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})
    shapes: ClassVar[frozenset[str]] = frozenset({"low/high"})

    path: Path | None = Field(
        None, description="the folder of DRSRD1, or a volume (z, y, x): .npz, .tif, .nc, .raw, a folder of slices"
    )
    scale: Literal[2, 3, 4] = 4
    kernel: Literal["default", "unknown"] = "default"
    noise: NonNegativeFloat = Field(0.0, description="on low images to learn from: sigma in grey levels, at most")
    blur: NonNegativeFloat = Field(0.0, description="of low images to learn from: sigma in their pixels, at most")
    seed: int = Field(0, ge=0, lt=2**32)

    subset: Literal["sandstone2D", "carbonate2D", "shuffled2D"] = Field("shuffled2D", description="of DRSRD1")
    held_out: Literal["valid", "test"] = Field("test", description="the part of DRSRD1 that is set aside")

    partner: Path | None = Field(None, description="the registered low-resolution volume, if not `lr` in the .npz")
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where a volume is not 8-bit"
    )
    partner_window: tuple[float, float] | None = Field(None, description="the partner's, if not the same")
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="of a .raw volume: z, y, x")
    partner_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="of a .raw partner")
    dtype: str | None = Field(None, description="of .raw volumes, as numpy writes it: uint8, <u2, >f4, …")
    across: Literal["z", "y", "both"] = Field("z", description="what the slices of a volume lie across")
    train_until: PositiveInt | None = Field(None, description="x of a volume where training ends; 75 % if unset")
    held_out_from: PositiveInt | None = Field(None, description="x where the part set aside begins; 80 % if unset")

    size: PositiveInt = Field(192, ge=48, description="side of a synthetic slice, pixels")
    train_slices: PositiveInt = Field(32, description="synthetic slices to learn from")
    held_out_slices: PositiveInt = 12
    porosity: float = Field(0.2, gt=0, lt=1, description="share of pores in a synthetic slice")
    grain: PositiveFloat = Field(8.0, description="correlation length of synthetic rock, pixels")
    residual: NonNegativeFloat = Field(2.0, description="noise that denoising left in a synthetic slice, grey levels")

    @classmethod
    def takes(cls, path: str) -> bool:
        """Any path: no other data of its kind has one."""
        return True

    def check(self) -> None:
        """Raise `UserError` for settings that cannot go together, or a path that is not there."""
        if self.path is None and self.size % self.scale:
            raise UserError(f"size {self.size} is no multiple of scale {self.scale}")
        if self.partner is not None and not self._is_volume:
            raise UserError(f"partner {str(self.partner)!r} needs a path to a volume: {VOLUMES}")
        self._check_numbers()
        if self.path is not None and not self._is_volume and self.scale == 3:
            raise UserError("scale 3 is not among the low-resolution images of DRSRD1: 2 or 4")
        if self.train_until and self.held_out_from and self.train_until > self.held_out_from:
            raise UserError(f"train_until {self.train_until} is past held_out_from {self.held_out_from}")
        if self.path is not None and not at_home(self.path).exists():
            cure = "" if self._is_volume else "; unpack DRSRD1 there, or set path to where it is"
            raise UserError(f"there is no {'file' if self._is_volume else 'folder'} {str(self.path)!r}{cure}")

    def _check_numbers(self) -> None:
        for name, window in (("window", self.window), ("partner_window", self.partner_window)):
            if window and not window[0] < window[1]:
                raise UserError(f"{name} {list(window)}: its first number is to be below its second")
        if self.dtype is not None:
            import numpy as np

            try:
                numbers = np.dtype(self.dtype).kind in "iuf"
            except TypeError:
                numbers = False
            if not numbers:
                raise UserError(f"dtype {self.dtype!r} is no kind of numbers; write uint8, <u2, >i2, <f4, …")

    def read(self) -> Split:
        """All pairs, low and high. Raises `UserError` naming the first file that is missing or does not fit."""
        self.check()
        from llmq.data.rock_files import changed

        if self.path is None:
            return _synthetic(self)
        if self._is_volume:
            return _volume(self, *(changed(file) for file in (self.path, self.partner)))
        return self._drsrd1()

    @property
    def _is_volume(self) -> bool:
        from llmq.data.rock_volumes import is_volume

        return self.path is not None and is_volume(self.path)

    def _drsrd1(self) -> Split:
        from llmq.data.rock_files import digest, find_pairs, open_pair

        root = at_home(str(self.path))
        parts = [find_pairs(root, p, self.subset, self.kernel, self.scale) for p in ("train", self.held_out)]
        files = [file for part in parts for pair in part for file in pair]
        opened = partial(open_pair, window=self.window)
        return self.split(Lazily(parts[0], opened), Lazily(parts[1], opened), digest(files))

    def lower(self, side: int, image: Any, number: int) -> Any:
        """The low-resolution image of one slice, the `number`th of training (`side` 0) or held out (1)."""
        import numpy as np

        from llmq.data.degrade import KERNELS, downsample

        chosen = np.random.default_rng([self.seed, side, number, 1]).choice(sorted(KERNELS))
        return downsample(image, self.scale, "cubic" if self.kernel == "default" else str(chosen))

    def split(self, train: Sequence[Example], held_out: Sequence[Example], digest: str) -> Split:
        """The two parts, the first with noise and blur where they are asked for; `digest` tells the images apart."""
        if self.noise or self.blur:
            train = Lazily(range(len(train)), partial(self._disturbed, train))
        settings = self.model_dump_json(exclude={"path", "partner"})
        return make_split(train, held_out, "low/high", [digest, settings])

    def _disturbed(self, train: Sequence[Example], number: int) -> Example:
        import numpy as np

        from llmq.data.degrade import disturb

        rng = np.random.default_rng([self.seed, 0, number, 2])
        return replace(train[number], image=disturb(train[number].image, rng, self.noise, self.blur))

    def synthetic(self, side: int, number: int) -> Example:
        """One synthetic slice of training (`side` 0) or held out (1); each has random numbers of its own."""
        import numpy as np

        from llmq.data.synthetic_rock import rock_slice

        rng = np.random.default_rng([self.seed, side, number, 0])
        high = rock_slice(rng, self.size, self.porosity, self.grain, self.residual)
        return Example(
            f"synthetic {'held out' if side else 'train'} {number}", self.lower(side, high, number), high=high
        )


@lru_cache(maxsize=4)
def _synthetic(rock: Rock) -> Split:
    counts = (rock.train_slices, rock.held_out_slices)
    train, held_out = ([rock.synthetic(side, number) for number in range(n)] for side, n in enumerate(counts))
    return rock.split(train, held_out, "synthetic")


@lru_cache(maxsize=2)
def _volume(rock: Rock, *changed: int) -> Split:
    # Cached, as every stage asks for its data again; `changed` tells a file that was written anew.
    from llmq.data import rock_volumes
    from llmq.files import sha256_files

    path = at_home(str(rock.path))
    partner = at_home(rock.partner) if rock.partner else None
    how = rock_volumes.Reading(rock.window, rock.shape, rock.dtype)
    of_partner = rock_volumes.Reading(rock.partner_window or rock.window, rock.partner_shape, rock.dtype)
    high, low = rock_volumes.read_volumes(path, partner, how, of_partner)
    if low is not None:
        rock_volumes.check_partner(str(path), high, low, rock.scale, across_z=rock.across == "z")
    width = high.shape[2]
    ends = (rock.train_until or width * 3 // 4, rock.held_out_from or width * 4 // 5)
    if ends[0] < rock.scale or ends[0] > ends[1] or ends[1] + 2 * rock.scale > width:
        raise UserError(f"{path}: training until {ends[0]}, held out from {ends[1]}: it has {width} columns")
    sides: list[list[Example]] = [[], []]
    for side, (begin, end) in enumerate(((0, ends[0]), (ends[1], width))):
        volumes = rock_volumes.cut(high, low, begin, end, rock.scale)
        for across in ("z", "y") if rock.across == "both" else (rock.across,):
            lower = partial(rock.lower, side)
            sides[side] += rock_volumes.slices(*volumes, rock.scale, across, path.name, lower)
    files = [file for its in (path, partner) if its for file in rock_volumes.files_of(its)]
    return rock.split(sides[0], sides[1], sha256_files(files))

"""Slices of rock, low and high: the DRSRD1 data set, a scanned volume, or (no path) seeded synthetic micro-CT.

Low-resolution images that are not given are made: by bicubic with antialiasing (`default`), or by one of five kernels
at random (`unknown`). A volume is parted along x, with a gap between. Noise and blur on images to learn from are drawn
anew at every step of a training, up to stated strengths, or around those of a scan (`like`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from llmq.errors import UserError
from llmq.files import at_home, sha256_files, sha256_text
from llmq.terminal import say
from llmq.types import Data, Expected, Split
from llmq.vision import volumes
from llmq.vision.images import VOLUMES as VOLUMES_OF
from llmq.vision.images import Example, Lazily, facts, make_split, read_image, size_of_file
from llmq.vision.pixels import Window, check_window

if TYPE_CHECKING:
    from numpy import ndarray

    from llmq.vision.degrade import Disturbance

MOST_SIDE = 128  # eight times as many numbers are drawn first
LOOKED_AT = 16
"""The slices at most that noise and blur are estimated from."""
VOLUMES = "an .npz, .tif, .dcm, .nc or .raw, or a folder of slices"


class Rock(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"super-resolution"})
    shapes: ClassVar[frozenset[str]] = frozenset({"low/high", VOLUMES_OF})

    path: Path | None = Field(
        None, description="the folder of DRSRD1, or a volume (z, y, x): .npz, .tif, .dcm, .nc, .raw, slices"
    )
    scale: Literal[2, 3, 4] = 4
    kernel: Literal["default", "unknown"] = "default"
    noise: NonNegativeFloat = Field(0.0, description="on low images to learn from: sigma in grey levels, at most")
    blur: NonNegativeFloat = Field(0.0, description="of low images to learn from: sigma in their pixels, at most")
    like: Literal["held_out"] | Path | None = Field(
        None, description="the held-out low images or a scan; noise and blur are then 0.5 to 1.5 times theirs"
    )
    held_out_noise: NonNegativeFloat = Field(0.0, description="on low images held out: sigma in grey levels, exactly")
    held_out_blur: NonNegativeFloat = Field(0.0, description="of low images held out: sigma in their pixels, exactly")
    seed: int = Field(0, ge=0, lt=2**32)

    subset: Literal["sandstone2D", "carbonate2D", "shuffled2D"] = Field("shuffled2D", description="of DRSRD1")
    held_out: Literal["valid", "test"] = Field("test", description="the part of DRSRD1 that is set aside")

    partner: Path | None = Field(None, description="the registered low-resolution volume, if not `lr` in the .npz")
    native: Literal["all", "held_out"] = Field(
        "all", description="low images that are the partner's: all, or those held out alone; the others are made"
    )
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where a volume is not 8-bit"
    )
    partner_window: tuple[float, float] | None = Field(None, description="the partner's, if not the same")
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="of a .raw volume: z, y, x")
    partner_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="of a .raw partner")
    dtype: str | None = Field(None, description="of .raw volumes, as numpy writes it: uint8, <u2, >f4, …")
    voxel_size: PositiveFloat | None = Field(
        None,
        description="micrometres that a high-resolution voxel is wide, for scale bars; what the volume says, if unset",
    )
    dimensions: Literal[2, 3] = Field(2, description="3: volumes to learn from, not slices, for a network of volumes")
    across: Literal["z", "y", "both"] = Field(
        "z", description="the axis that the slices of a volume lie across; both: to learn from"
    )
    train_until: PositiveInt | None = Field(None, description="x of a volume where training ends; 75 % if unset")
    held_out_from: PositiveInt | None = Field(None, description="x where the part set aside begins; 80 % if unset")

    size: PositiveInt = Field(192, ge=48, description="side of a synthetic slice, pixels")
    train_slices: PositiveInt = Field(32, description="synthetic slices to learn from")
    held_out_slices: PositiveInt = 12
    porosity: float = Field(0.2, gt=0, lt=1, description="share of pores in a synthetic slice")
    grain: PositiveFloat = Field(8.0, description="correlation length of synthetic rock, pixels")
    residual: NonNegativeFloat = Field(2.0, description="noise that denoising left in a synthetic slice, grey levels")

    @classmethod
    def takes(cls, path: str) -> bool:  # the only data of this kind with a path
        return True

    def check(self) -> None:
        if self.like is not None and (self.noise or self.blur):
            raise UserError(f"like {str(self.like)!r} estimates noise and blur; leave noise and blur out")
        if isinstance(self.like, Path) and not at_home(self.like).exists():
            raise UserError(f"there is no file {str(self.like)!r}")
        if self.dimensions == 3 and self.path is None and self.size > MOST_SIDE:
            raise UserError(
                f"size {self.size} in 3 dimensions; synthetic volumes have {MOST_SIDE} pixels a side at most"
            )
        if self.dimensions == 3 and self.path is not None and not self._is_volume:
            raise UserError(f"dimensions 3 needs a path to a volume: {VOLUMES}")
        if self.path is None and self.size % self.scale:
            raise UserError(f"size {self.size} is no multiple of scale {self.scale}")
        fields = type(self).model_fields
        for name in ("partner", "native", "across", "train_until", "held_out_from"):
            if (told := getattr(self, name)) != fields[name].default and not self._is_volume:
                raise UserError(f"{name} {str(told)!r} needs a path to a volume: {VOLUMES}")
        if self.across != "z" and self.dimensions == 3:
            raise UserError(f"across {self.across!r} cuts slices; leave it out, or dimensions: 3")
        check_window(self.window)
        check_window(self.partner_window, "partner_window")
        volumes.check_dtype(self.dtype)
        if self.path is not None and not self._is_volume and self.scale == 3:
            raise UserError("scale 3 is not among the low-resolution images of DRSRD1: 2 or 4")
        if self.train_until and self.held_out_from and self.train_until > self.held_out_from:
            raise UserError(f"train_until {self.train_until} is past held_out_from {self.held_out_from}")
        if self.path is not None and not at_home(self.path).exists():
            cure = "" if self._is_volume else "; unpack DRSRD1 there, or set path to where it is"
            raise UserError(f"there is no {'file' if self._is_volume else 'folder'} {str(self.path)!r}{cure}")

    def expected(self) -> Expected | None:
        if self.path is not None:
            path = at_home(self.path)
            if not path.exists():
                return None
            return self._expected_of_volume(path) if self._is_volume else self._expected_of_drsrd1(path)
        return Expected(self.train_slices, self.held_out_slices, (self.size // self.scale) ** self.dimensions)

    def _expected_of_volume(self, path: Path) -> Expected | None:
        from llmq.vision.volume_shapes import shapes_of

        high, low = shapes_of(path, ("hr", "lr"), volumes.Reading(shape=self.shape))
        if self.partner is not None:
            low, _ = shapes_of(at_home(self.partner), ("lr", "hr"), volumes.Reading(shape=self.partner_shape))
        if high is None:
            return None
        z, y, x = (side // self.scale for side in high)
        ends = self._ends(high[2])
        until, begin = ends[0] // self.scale, -(-ends[1] // self.scale)
        if self.dimensions == 3:
            return Expected(volumes.count_of_cubes((z, y, until)), 1, z * y * (x - begin))
        # A thick slice of a registered partner has one slice of the volume beside it.
        counts = {"z": (low or high)[0], "y": (low or high)[1]}
        first = self._axes[0]
        train = sum(counts[axis] if self.native == "all" else high["zy".index(axis)] for axis in self._axes)
        return Expected(train, counts[first], (y if first == "z" else z) * (x - begin))

    def _expected_of_drsrd1(self, root: Path) -> Expected | None:
        counts = [len(list((root / f"{self.subset}_{p}_HR").glob("*.png"))) for p in ("train", self.held_out)]
        first = next((root / f"{self.subset}_{self.held_out}_HR").glob("*.png"), None)
        if first is None:
            return None
        width, height, _ = size_of_file(first)
        return Expected(counts[0], counts[1], width // self.scale * (height // self.scale))

    def _ends(self, width: int) -> tuple[int, int]:
        """The columns of a volume where training ends and where the part set aside begins."""
        return self.train_until or width * 3 // 4, self.held_out_from or width * 4 // 5

    def read(self) -> Split:
        self.check()
        if self.path is None:
            return _synthetic(self, _last_change(self._scan))
        if self._is_volume:
            return _volume(self, *(_last_change(file) for file in (self.path, self.partner, self._scan)))
        return self._drsrd1(at_home(self.path))

    @property
    def _axes(self) -> tuple[str, ...]:
        """The axes that slices lie across; those held out lie across the first, or they would cross one another."""
        return ("z", "y") if self.across == "both" else (self.across,)

    @property
    def _reading_of_partner(self) -> volumes.Reading:
        return volumes.Reading(self.partner_window or self.window, self.partner_shape, self.dtype)

    @property
    def _scan(self) -> Path | None:
        """The file of `like`."""
        return self.like if isinstance(self.like, Path) else None

    @property
    def _is_volume(self) -> bool:
        from llmq.vision.volumes import is_volume

        return self.path is not None and is_volume(self.path)

    def _drsrd1(self, root: Path) -> Split:
        parts = [find_pairs(root, p, self.subset, self.kernel, self.scale) for p in ("train", self.held_out)]
        known = {facts(high)[-1]: high for _, high in parts[0]}
        if both := next((high for _, high in parts[1] if facts(high)[-1] in known), None):
            other = known[facts(both)[-1]]
            raise UserError(f"{both}: the same image as {other}, which is to be learned from; leave one of them out")
        digest = sorted(f"{file.name} {facts(file)[-1]}" for part in parts for pair in part for file in pair)
        train, held_out = (Lazily(part, partial(open_pair, window=self.window)) for part in parts)
        return self.split(train, held_out, sha256_text(*digest))

    def lower(self, side: int, image: "ndarray", number: int) -> "ndarray":
        """The low-resolution image of one slice, the `number`th of training (`side` 0) or held out (1)."""
        import numpy as np

        from llmq.vision.degrade import KERNELS, downsample

        chosen = np.random.default_rng([self.seed, side, number, 1]).choice(sorted(KERNELS))
        return downsample(image, self.scale, "cubic" if self.kernel == "default" else str(chosen))

    def split(self, train: Sequence[Example], held_out: Sequence[Example], digest: str) -> Split:
        """The split, with noise and blur if they are set; `digest` identifies the images."""
        if self.held_out_noise or self.held_out_blur:
            held_out = Lazily(range(len(held_out)), partial(self._scanned, held_out))
        if drawn := self._drawn(train, held_out):
            train = Lazily(train, partial(_disturbed, disturbance=drawn))
        settings = self.model_dump_json(exclude={"path", "partner", "voxel_size", *(("like",) if self._scan else ())})
        scan = [sha256_files(volumes.files_of(at_home(self._scan)))] if self._scan else []
        shape = "low/high" if self.dimensions == 2 else VOLUMES_OF
        split = make_split(train, held_out, shape, [digest, settings, *scan])
        volumetric = self.dimensions == 3
        return replace(split, pixel_size=self.voxel_size, apart=1.0 if volumetric else None, neighbours=volumetric)

    def _scanned(self, held_out: Sequence[Example], number: int) -> Example:
        """A held-out example as a scanner of stated noise and blur has it, the same each time."""
        import numpy as np

        from llmq.vision.degrade import Disturbance

        rng = np.random.default_rng([self.seed, 1, number, 2])
        scanner = Disturbance((self.held_out_noise,) * 2, (self.held_out_blur,) * 2)
        return replace(held_out[number], image=scanner.of(held_out[number].image, rng))

    def _drawn(self, train: Sequence[Example], held_out: Sequence[Example]) -> "Disturbance | None":
        """The noise and blur that training adds: up to those set, or around those that `like` shows."""
        from llmq.vision.degrade import Disturbance

        if self.like is None:
            return Disturbance((0.0, self.noise), (0.0, self.blur)) if self.noise or self.blur else None
        from llmq.vision.scan_quality import noise_and_blur

        if self._scan:
            scans = list(volumes.read_scan(at_home(self._scan), self._reading_of_partner)[:LOOKED_AT])
        else:
            scans = _low_slices(held_out)
        noise, blur = noise_and_blur(scans, _low_slices(train))
        say(
            f"{self.like}: noise of {noise:.2f} grey levels and a blur of {blur:.2f} pixels beside images to learn from"
        )
        return Disturbance((0.5 * noise, 1.5 * noise), (0.5 * blur, 1.5 * blur))

    def synthetic(self, side: int, number: int) -> Example:
        """One synthetic slice of training (`side` 0) or held out (1); each has random numbers of its own."""
        import numpy as np

        from llmq.data.rock.synthetic import rock_slice, rock_volume

        rng = np.random.default_rng([self.seed, side, number, 0])
        made = rock_slice if self.dimensions == 2 else rock_volume
        high = made(rng, self.size, self.porosity, self.grain, self.residual)
        name = f"synthetic {'held out' if side else 'train'} {number}"
        return Example(name, self.lower(side, high, number), high=high)


def _low_slices(pairs: Sequence[Example]) -> "list[ndarray]":
    """The first low-resolution slices `(height, width)` of pairs, be they slices or volumes."""
    images = (pair.image[..., 0] for pair in pairs[:LOOKED_AT])
    return [each for image in images for each in (image if image.ndim == 3 else [image])][:LOOKED_AT]


def _disturbed(example: Example, disturbance: "Disturbance") -> Example:
    return replace(example, disturbance=disturbance)


def open_pair(pair: tuple[Path, Path], window: Window | None) -> Example:
    """A pair of files, low and high, as an example."""
    low, high = pair
    return Example(f"{high.parent.name}/{high.name}", read_grey(low, window), high=read_grey(high, window))


def read_grey(path: Path, window: Window | None = None) -> "ndarray":
    """A slice as uint8 `(height, width, 1)`. Raises `UserError` for colour channels that differ."""
    image = read_image(path, 3, window)
    if (image != image[..., :1]).any():
        raise UserError(f"{path}: its colour channels are unlike, and rock is grey; save it in grey")
    return image[..., :1].copy()


def find_pairs(root: Path, part: str, subset: str, kernel: str, scale: int) -> list[tuple[Path, Path]]:
    """The (low, high) pairs of files of one part, checked for sizes that fit.

    `sandstone2D_train_HR/0001.png` goes with `sandstone2D_train_LR_default_X4/0001x4.png`. Raises `UserError` for the
    first file that is missing, unreadable, or of another size.
    """
    folder = root / f"{subset}_{part}_HR"
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; unpack DRSRD1 there, or set path to where it is")
    lows = root / f"{subset}_{part}_LR_{kernel}_X{scale}"
    pairs = [(lows / f"{high.stem}x{scale}.png", high) for high in sorted(folder.glob("*.png"))]
    if not pairs:
        raise UserError(f"{folder}: there is no *.png in it")
    for low, high in pairs:
        if not low.is_file():
            raise UserError(f"{high}: its partner {str(low)!r} is missing; unpack that folder whole, too")
        (narrow, short), (wide, tall) = facts(low)[:2], facts(high)[:2]
        if (wide, tall) != (narrow * scale, short * scale):
            should = f"{narrow * scale} x {short * scale}"
            raise UserError(f"{low}: {narrow} x {short}, and {high} is {wide} x {tall}; at scale {scale} {should}")
    return pairs


def _last_change(path: Path | None) -> int:
    """The time of the last change to a file, or to a folder and its slices, in ns; 0 for a missing path."""
    path = path and at_home(path)
    if path is None or not path.exists():
        return 0
    return max(file.stat().st_mtime_ns for file in (path, *volumes.files_of(path)))


@lru_cache(maxsize=4)
def _synthetic(rock: Rock, last_change: int = 0) -> Split:
    counts = (rock.train_slices, rock.held_out_slices)
    train, held_out = ([rock.synthetic(side, number) for number in range(n)] for side, n in enumerate(counts))
    return rock.split(train, held_out, "synthetic")


@lru_cache(maxsize=2)  # every stage reads the data again; a changed file has another time
def _volume(rock: Rock, *last_changes: int) -> Split:
    path, partner = (at_home(file) if file else None for file in (rock.path, rock.partner))
    assert path
    how = volumes.Reading(rock.window, rock.shape, rock.dtype)
    high, low = volumes.read_volumes(path, partner, how, rock._reading_of_partner)
    if low is None and rock.native == "held_out":
        raise UserError(f"{path}: native held_out needs a registered partner, and there is none")
    if low is not None:
        across_z = rock.across == "z" and rock.dimensions == 2
        volumes.check_partner(str(path), high, low, rock.scale, across_z=across_z)
        volumes.say_unlike(str(path), high, low, rock.scale)
    width = high.shape[2]
    ends = rock._ends(width)
    if ends[0] < rock.scale or ends[0] > ends[1] or ends[1] + 2 * rock.scale > width:
        raise UserError(f"{path}: training until {ends[0]}, held out from {ends[1]}: it has {width} columns")
    sides: list[list[Example]] = [[], []]
    for side, (begin, end) in enumerate(((0, ends[0]), (ends[1], width))):
        parts = volumes.cut(high, low if side or rock.native == "all" else None, begin, end, rock.scale)
        lower = partial(rock.lower, side)
        if rock.dimensions == 3:
            pair = volumes.whole(*parts, rock.scale, path.name, lower)
            sides[side] += [pair] if side else volumes.cubes(pair, rock.scale)  # pores held out stay connected
            continue
        for across in rock._axes[:1] if side else rock._axes:
            sides[side] += volumes.slices(*parts, rock.scale, across, path.name, lower)
    files = [file for volume in (path, partner) if volume for file in volumes.files_of(volume)]
    split = replace(rock.split(sides[0], sides[1], sha256_files(files)), neighbours=True)
    if rock.dimensions == 2:
        axis = ("z", "y").index(rock._axes[0])
        split = replace(split, apart=1.0 if low is None else high.shape[axis] / low.shape[axis])
    return split if split.pixel_size else replace(split, pixel_size=volumes.voxel_size(path))

"""Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 grey pixels, ten classes of clothing.

Read from a folder with its four files (`train-images-idx3-ubyte.gz` …, packed or not), from where Debian's package
dataset-fashion-mnist puts them, or else from the hub.
"""

import gzip
import hashlib
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from llmq.errors import UserError, first_line
from llmq.files import at_home, sha256_files, sha256_text
from llmq.types import Data, Split
from llmq.vision.images import Example, Lazily, make_split

if TYPE_CHECKING:
    from numpy import ndarray

Parts = dict[str, tuple["ndarray", "ndarray"]]
"""Images `(n, 28, 28)` and labels `(n,)` of `train` and `held_out`."""

DEBIAN = "/usr/share/datasets/fashion-mnist"
HUB = "zalando-datasets/fashion_mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = {"train": "train-{}-idx{}-ubyte", "held_out": "t10k-{}-idx{}-ubyte"}


class FashionMnist(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "gan"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/label"})

    path: str | None = Field(None, description="folder of the four files; Debian's, or else the hub, if unset")
    limit: PositiveInt | None = Field(None, description="use the first training images only")

    def check(self) -> None:
        if folder := self._folder():
            for part in FILES:
                _files_of(folder, part)

    def _folder(self) -> Path | None:
        if self.path is not None:
            return at_home(self.path)
        return Path(DEBIAN) if Path(DEBIAN).is_dir() else None

    def read(self) -> Split:
        folder = self._folder()
        parts, digest = _of_folder(folder) if folder else _of_hub()
        train, held_out = (_examples(part, *parts[part]) for part in FILES)
        return make_split(train[: self.limit], held_out, "image/label", [digest, str(self.limit)], CLASSES)


def _examples(part: str, images: "ndarray", labels: "ndarray") -> Lazily:
    return Lazily(range(len(labels)), lambda i: Example(f"{part} {i}", images[i][..., None], int(labels[i])))


def _files_of(folder: Path, part: str) -> list[Path]:
    files = []
    for name in (FILES[part].format("images", 3), FILES[part].format("labels", 1)):
        there = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not there:
            raise UserError(f"{str(folder)!r} has neither {name} nor {name}.gz")
        files.append(there[0])
    return files


@cache
def _of_folder(folder: Path) -> tuple[Parts, str]:
    files = {part: _files_of(folder, part) for part in FILES}
    parts: Parts = {part: (read_idx(images, 3), read_idx(labels, 1)) for part, (images, labels) in files.items()}
    for part, (images, labels) in parts.items():
        if len(images) != len(labels):
            raise UserError(
                f"{files[part][1]}: {len(labels)} labels, and {files[part][0].name} has {len(images)} images"
            )
        if len(labels) and labels.max() >= len(CLASSES):
            raise UserError(f"{files[part][1]}: label {labels.max()} is unknown; there are {len(CLASSES)} classes")
    return parts, sha256_files([file for pair in files.values() for file in pair])


@cache
def _of_hub() -> tuple[Parts, str]:
    import numpy as np
    from datasets import load_dataset

    try:
        data = load_dataset(HUB)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is neither in {DEBIAN!r} (Debian's dataset-fashion-mnist), nor in the hub's cache, nor "
            f"reachable: {first_line(error)}"
        ) from None
    named = {"train": data["train"], "held_out": data["test"]}
    parts = {
        part: (np.stack([np.asarray(image) for image in rows["image"]]), np.asarray(rows["label"]))
        for part, rows in named.items()
    }
    return parts, sha256_text(*(hashlib.sha256(a.tobytes()).hexdigest() for pair in parts.values() for a in pair))


def read_idx(path: Path, dimensions: int) -> "ndarray":
    """The array of bytes in an idx file of MNIST. Raises `UserError` for another format, or a file cut short."""
    import numpy as np

    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: no idx file of bytes in {dimensions} dimensions; it begins with {data[:4]!r}")
    begin = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:begin]) if len(data) >= begin else (0,)
    wanted = int(np.prod(shape, dtype=np.int64))
    if not wanted or len(data) - begin != wanted:
        raise UserError(f"{path}: promises {'x'.join(map(str, shape))} bytes, and {len(data) - begin} follow")
    made: ndarray = np.frombuffer(data, np.uint8, offset=begin).reshape(shape)
    return made

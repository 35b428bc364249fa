"""Images in folders."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llmq.data.images import Example, Lazily, make_split, read_image
from llmq.errors import UserError, did_you_mean
from llmq.types import Data, Split

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
HELD_OUT = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class _Item:
    name: str
    path: Path
    label: int | None
    sha256: str


class ImageFolder(Data):
    """Images in a folder for each class, under `train/` and `val/` where there are such; or images without labels.

    Classes are numbered by the order of their folders' names. Without a `val`, `valid`, `validation` or `test` folder a
    share of each class is held out, chosen by the hash of the file. A file that stands twice is used once.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "gan"})

    path: str
    labels: bool | None = Field(None, description="whether folders are classes; where there are any if unset")
    channels: Literal[1, 3] = Field(3, description="1 reads all as grey")
    held_out: float = Field(0.2, gt=0, lt=1, description="share set aside where no folder says so")

    @classmethod
    def takes(cls, path: str) -> bool:
        """Any path: no other data of its kinds has one."""
        return True

    def check(self) -> None:
        """Raise `UserError` for a folder that is not there or has no image."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UserError(f"there is no folder {self.path!r}")
        if not any(_is_image(path) for path in root.rglob("*")):
            raise UserError(f"{self.path!r} has no image ({', '.join(sorted(SUFFIXES))})")

    def read(self) -> Split:
        """All images, each opened once to see that it can be; later when it is asked for."""
        self.check()
        root = Path(self.path).expanduser()
        named = [root / name for name in ("train", *HELD_OUT) if (root / name).is_dir()]
        parts = named if (root / "train").is_dir() else [root]
        classes = self._classes(parts)
        skipped = {"duplicates": 0, "no_image": sum(_is_foreign(path) for part in parts for path in part.rglob("*"))}
        seen: set[str] = set()
        found: list[list[_Item]] = [[] for _ in parts]
        for items, part in zip(found, parts, strict=True):
            for item in _items(root, part, classes):
                if item.sha256 in seen:
                    skipped["duplicates"] += 1
                else:
                    seen.add(item.sha256)
                    items.append(item)
        sides = _divided(found, self.held_out)
        train, held_out = (Lazily(side, partial(_open, channels=self.channels)) for side in sides)
        digest = [f"{side} {item.name} {item.sha256}" for side, items in enumerate(sides) for item in items]
        return make_split(train, held_out, "image/label" if classes else "image", digest, classes, skipped)

    def _classes(self, parts: Sequence[Path]) -> tuple[str, ...]:
        folders = [
            sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")) for part in parts
        ]
        if self.labels is False or (self.labels is None and not any(folders)):
            return ()
        for part, names in zip(parts, folders, strict=True):
            if not names:
                raise UserError(f"{str(part)!r} has no class folders; labels: false takes images without labels")
            loose = [path.name for path in sorted(part.iterdir()) if _is_image(path)]
            if loose:
                raise UserError(f"{part / loose[0]}: lies beside class folders, in none; move it, or set labels: false")
            unknown = sorted(set(names) - set(folders[0]))
            if unknown:
                raise UserError(
                    f"{part / unknown[0]}: class {unknown[0]!r} is not in {parts[0].name!r}"
                    f"{did_you_mean(unknown[0], folders[0])}"
                )
        return tuple(folders[0])


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_foreign(path: Path) -> bool:
    return not _is_image(path) and path.is_file()


def _items(root: Path, part: Path, classes: Sequence[str]) -> Iterator[_Item]:
    folders = [(label, part / name) for label, name in enumerate(classes)] if classes else [(None, part)]
    for label, folder in folders:
        files = sorted(path for path in folder.rglob("*") if _is_image(path)) if folder.is_dir() else []
        if not files and folder.is_dir():
            raise UserError(f"{str(folder)!r} has no image")
        for path in files:
            about = path.stat()
            sha256 = _checked(path, about.st_size, about.st_mtime_ns)
            yield _Item(str(path.relative_to(root)), path, label, sha256)


@cache
def _checked(path: Path, size: int, changed: int) -> str:
    """The hash of a file that is a whole image. Size and time of change are there for the cache."""
    read_image(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _divided(found: Sequence[Sequence[_Item]], share: float) -> tuple[list[_Item], list[_Item]]:
    """Training and held-out items, each in the order of their hashes, so that the first few are of all classes."""
    sides: tuple[list[_Item], list[_Item]] = ([], [])
    if len(found) > 1:
        sides[0].extend(found[0])
        sides[1].extend(item for items in found[1:] for item in items)
    else:
        for label in {item.label: None for item in found[0]}:
            items = sorted((i for i in found[0] if i.label == label), key=_hash)
            n = round(share * len(items))
            sides[1].extend(items[:n])
            sides[0].extend(items[n:])
    return sorted(sides[0], key=_hash), sorted(sides[1], key=_hash)


def _hash(item: _Item) -> str:
    return item.sha256


def _open(item: _Item, channels: int) -> Example:
    return Example(item.name, read_image(item.path, channels), item.label)

"""Images in folders."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llmq.data.folders import is_no_data, under
from llmq.data.images import Example, Lazily, make_split, read_image
from llmq.data.pixels import Window
from llmq.errors import UserError, did_you_mean
from llmq.files import at_home
from llmq.types import Data, Split

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TRAIN = frozenset({"train", "training"})
VALIDATION = frozenset({"val", "valid", "validation", "dev", "eval"})
TEST = frozenset({"test", "testing"})


@dataclass(frozen=True)
class _Item:
    name: str
    path: Path
    label: int | None
    sha256: str


class ImageFolder(Data):
    """Images in a folder for each class, under `train/` and `val/` or `test/` where there are such; or without labels.

    Classes are numbered by the order of their folders' names. Folders of parts are known by their usual names in any
    case (Training, valid, dev, …); where there are both, `test` is held out and `val` is left out. Without one a share
    of each class is held out, chosen by the hash of the file. A file that stands twice is used once; one that stands in
    two classes in neither. Links are followed. An image is turned as it is shown (EXIF).
    """

    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "gan"})

    path: str
    labels: bool | None = Field(None, description="whether folders are classes; where there are any if unset")
    channels: Literal[1, 3] = Field(3, description="1 reads all as grey")
    held_out: float = Field(0.2, gt=0, lt=1, description="share set aside where no folder says so")
    part: Literal["test", "val"] = Field("test", description="which of two folders is held out, where there are both")
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where images are not 8-bit"
    )

    @classmethod
    def takes(cls, path: str) -> bool:
        """Any path: no other data of its kinds has one."""
        return True

    def check(self) -> None:
        """Raise `UserError` for a folder that is not there or has no image."""
        root = at_home(self.path)
        if not root.is_dir():
            raise UserError(f"there is no folder {self.path!r}")
        if self.window and not self.window[0] < self.window[1]:
            raise UserError(f"window {list(self.window)}: its first number is to be below its second")
        if not under(root, SUFFIXES).images:
            raise UserError(f"{self.path!r} has no image ({', '.join(sorted(SUFFIXES))})")

    def read(self) -> Split:
        """All images, each opened once to see that it can be; later when it is asked for."""
        self.check()
        root = at_home(self.path)
        parts = self._parts(root)
        classes = self._classes(parts)
        found = [list(self._items(root, part, classes)) for part in parts]
        everything = under(root, SUFFIXES)
        used = sum(map(len, found))
        skipped = {"duplicates": 0, "in_two_classes": 0, "no_image": 0, **everything.left_out}
        if beside := len(everything.images) - used:
            skipped["outside_the_parts"] = beside
        sides = _divided(_once(found, skipped), self.held_out)
        train, held_out = (Lazily(side, partial(_open, channels=self.channels, window=self.window)) for side in sides)
        digest = [f"{side} {item.name} {item.sha256}" for side, items in enumerate(sides) for item in items]
        if self.window:
            digest.append(f"window {self.window}")
        names = tuple(map(_shown, classes))
        return make_split(train, held_out, "image/label" if classes else "image", digest, names, skipped)

    def _parts(self, root: Path) -> list[Path]:
        """The folder to learn from and the one to hold out; the root itself where no folders are parts."""
        folders = [p for p in _entries(root) if p.is_dir() and under(p, SUFFIXES).images]
        roles = [[p for p in folders if p.name.lower() in names] for names in (TRAIN, VALIDATION, TEST)]
        for alike in roles:
            if len(alike) > 1:
                raise UserError(f"{alike[0]} and {alike[1].name!r} are the same part of the data; join them")
        train, validation, test = (its[0] if its else None for its in roles)
        named = [p for p in (train, validation, test) if p]
        others = [p for p in folders if p not in named]
        if train is None:
            if named and not others:
                raise UserError(f"{named[0]}: there is no folder to learn from beside it; call one 'train'")
            return [root]
        if others and not any(p.is_dir() for p in _entries(train)):
            return [root]  # a class called train, beside others
        if others and self.labels is not False:
            raise UserError(f"{others[0]}: lies beside {train.name!r}, and is no part of the data; move it")
        kept = (test or validation) if self.part == "test" else (validation or test)
        return [train, kept] if kept else [train]

    def _classes(self, parts: Sequence[Path]) -> tuple[str, ...]:
        folders = [sorted(p.name for p in _entries(part) if p.is_dir()) for part in parts]
        if self.labels is False or (self.labels is None and not any(folders)):
            return ()
        for part, names in zip(parts, folders, strict=True):
            if not names:
                raise UserError(f"{str(part)!r} has no class folders; labels: false takes images without labels")
            loose = [path.name for path in _entries(part) if _is_image(path)]
            if loose:
                raise UserError(f"{part / loose[0]}: lies beside class folders, in none; move it, or set labels: false")
            unknown = sorted(set(names) - set(folders[0]))
            if unknown:
                raise UserError(
                    f"{part / unknown[0]}: class {unknown[0]!r} is not in {parts[0].name!r}"
                    f"{did_you_mean(unknown[0], folders[0])}"
                )
        return tuple(folders[0])

    def _items(self, root: Path, part: Path, classes: Sequence[str]) -> Iterator[_Item]:
        folders = [(label, part / name) for label, name in enumerate(classes)] if classes else [(None, part)]
        for label, folder in folders:
            files = under(folder, SUFFIXES).images if folder.is_dir() else []
            if not files and folder.is_dir():
                raise UserError(f"{str(folder)!r} has no image")
            for path in files:
                about = path.stat()
                sha256 = _checked(path, about.st_size, about.st_mtime_ns, self.window)
                yield _Item(_shown(str(path.relative_to(root))), path, label, sha256)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, without what systems leave there."""
    return sorted(path for path in folder.iterdir() if not is_no_data(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _once(found: Sequence[Sequence[_Item]], skipped: dict[str, int]) -> list[list[_Item]]:
    """Every image once, where it stands first; none that stands in two classes, as one of them is wrong."""
    labels: dict[str, set[int | None]] = {}
    for item in (item for items in found for item in items):
        labels.setdefault(item.sha256, set()).add(item.label)
    seen: set[str] = set()
    kept: list[list[_Item]] = [[] for _ in found]
    for items, its in zip(found, kept, strict=True):
        for item in items:
            if len(labels[item.sha256]) > 1:
                skipped["in_two_classes"] += 1
            elif item.sha256 in seen:
                skipped["duplicates"] += 1
            else:
                seen.add(item.sha256)
                its.append(item)
    return kept


@cache
def _checked(path: Path, size: int, changed: int, window: Window | None) -> str:
    """The hash of a file that is a whole image. Size and time of change are there for the cache."""
    read_image(path, window=window)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _divided(found: Sequence[Sequence[_Item]], share: float) -> tuple[list[_Item], list[_Item]]:
    """Training and held-out items, each in the order of their hashes, so that the first few are of all classes.

    Of two images or more at least one is on each side.
    """
    sides: tuple[list[_Item], list[_Item]] = ([], [])
    if len(found) > 1:
        sides[0].extend(found[0])
        sides[1].extend(item for items in found[1:] for item in items)
    else:
        for label in {item.label: None for item in found[0]}:
            items = sorted((i for i in found[0] if i.label == label), key=_hash)
            n = min(max(1, round(share * len(items))), len(items) - 1)
            sides[1].extend(items[:n])
            sides[0].extend(items[n:])
    return sorted(sides[0], key=_hash), sorted(sides[1], key=_hash)


def _hash(item: _Item) -> str:
    return item.sha256


def _shown(name: str) -> str:
    """A file name as text; what is no UTF-8 in it is written as its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _open(item: _Item, channels: int, window: Window | None) -> Example:
    return Example(item.name, read_image(item.path, channels, window), item.label)

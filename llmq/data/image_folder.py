"""Images in a folder for each class, optionally under `train/` and `val/` or `test/`; or images without labels.

Classes are numbered by the order of their folders' names. The usual names of parts count in any case (Training, valid,
dev, …); where there are both, `test` is held out and `val` is left out. Without either a share of each class is held
out, chosen by the hash of the file. An image that lies there twice is used once, one in two classes not at all. Links
are followed. Images are turned by their EXIF orientation.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llmq.errors import UserError, did_you_mean
from llmq.files import at_home, sha256
from llmq.types import Data, Split
from llmq.vision.folders import is_no_data, under
from llmq.vision.images import Example, Lazily, make_split, read_image
from llmq.vision.pixels import Window, check_window

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
    pixels: str
    """The hash of the pixels: a copy in another format, or with other metadata, is the same image."""


class ImageFolder(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"classifier", "gan"})

    path: str
    labels: bool | None = Field(None, description="true: folders are classes; if unset, where there are any")
    channels: Literal[1, 3] = Field(3, description="1 reads all as grey")
    held_out: float = Field(0.2, gt=0, lt=1, description="share set aside where no folder says so")
    part: Literal["test", "val"] = Field("test", description="which of two folders is held out, where there are both")
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where images are not 8-bit"
    )

    @classmethod
    def takes(cls, path: str) -> bool:  # the only data of these kinds with a path
        return True

    def check(self) -> None:
        root = at_home(self.path)
        if not root.is_dir():
            raise UserError(f"there is no folder {self.path!r}")
        check_window(self.window)
        if not under(root, SUFFIXES).images:
            raise UserError(f"{self.path!r} has no image ({', '.join(sorted(SUFFIXES))})")

    def read(self) -> Split:
        self.check()
        root = at_home(self.path)
        parts = self._parts(root)
        classes = self._classes(parts)
        items = [list(self._items(root, part, classes)) for part in parts]
        everything = under(root, SUFFIXES)
        skipped = {"duplicates": 0, "in_two_classes": 0, "no_image": 0, **everything.left_out}
        if beside := len(everything.images) - sum(map(len, items)):
            skipped["outside_the_parts"] = beside
        sides = _divided(_once(items, skipped), self.held_out)
        train, held_out = (Lazily(side, partial(_open, channels=self.channels, window=self.window)) for side in sides)
        digest = [f"{number} {item.name} {item.sha256}" for number, side in enumerate(sides) for item in side]
        digest += [f"window {self.window}"] if self.window else []
        shape = "image/label" if classes else "image"
        return make_split(train, held_out, shape, digest, [_shown(name) for name in classes], skipped)

    def _parts(self, root: Path) -> list[Path]:
        """The training folder and the held-out folder; the root alone where no folder is a part."""
        folders = [p for p in _entries(root) if p.is_dir() and under(p, SUFFIXES).images]
        roles = [[p for p in folders if p.name.lower() in names] for names in (TRAIN, VALIDATION, TEST)]
        for alike in roles:
            if len(alike) > 1:
                raise UserError(f"{alike[0]} and {alike[1].name!r} are the same part of the data; join them")
        train, validation, test = (alike[0] if alike else None for alike in roles)
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
            loose = [path for path in _entries(part) if path.suffix.lower() in SUFFIXES and path.is_file()]
            if loose:
                raise UserError(f"{loose[0]}: lies beside class folders, in none; move it, or set labels: false")
            if unknown := sorted(set(names) - set(folders[0])):
                raise UserError(
                    f"{part / unknown[0]}: class {unknown[0]!r} is not in {parts[0].name!r}"
                    f"{did_you_mean(unknown[0], folders[0])}"
                )
        return tuple(folders[0])

    def _items(self, root: Path, part: Path, classes: Sequence[str]) -> Iterator[_Item]:
        folders = [(label, part / name) for label, name in enumerate(classes)] if classes else [(None, part)]
        for label, folder in folders:
            if not folder.is_dir():
                continue
            if not (files := under(folder, SUFFIXES).images):
                raise UserError(f"{str(folder)!r} has no image")
            for path in files:
                about = path.stat()
                hashes = _checked(path, about.st_size, about.st_mtime_ns, self.window)
                yield _Item(_shown(str(path.relative_to(root))), path, label, *hashes)


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_no_data(path))


def _once(parts: Sequence[Sequence[_Item]], skipped: dict[str, int]) -> list[list[_Item]]:
    """Every image once, in the first part that holds a copy; an image in two classes is dropped: one label is wrong."""
    labels: dict[str, set[int | None]] = {}
    for item in chain(*parts):
        labels.setdefault(item.pixels, set()).add(item.label)
    seen: set[str] = set()
    kept: list[list[_Item]] = [[] for _ in parts]
    for number, item in ((number, item) for number, items in enumerate(parts) for item in items):
        if len(labels[item.pixels]) > 1:
            skipped["in_two_classes"] += 1
        elif item.pixels in seen:
            skipped["duplicates"] += 1
        else:
            seen.add(item.pixels)
            kept[number].append(item)
    return kept


@cache
def _checked(path: Path, size: int, changed: int, window: Window | None) -> tuple[str, str]:
    """The hashes of an image's file and pixels. `size` and `changed` only make the cache miss after a change."""
    image = read_image(path, window=window)
    return sha256(path), hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()


def _divided(parts: Sequence[Sequence[_Item]], share: float) -> list[list[_Item]]:
    """Training and held-out items, each in the order of their hashes, so that the first few are of all classes.

    Each side gets at least one of two or more images of a class.
    """
    by_hash = attrgetter("sha256")
    train, held_out = list(parts[0]), list(chain(*parts[1:]))
    if len(parts) == 1:
        train = []
        for label in {item.label: None for item in parts[0]}:
            items = sorted((item for item in parts[0] if item.label == label), key=by_hash)
            n = min(max(1, round(share * len(items))), len(items) - 1)
            held_out += items[:n]
            train += items[n:]
    return [sorted(side, key=by_hash) for side in (train, held_out)]


def _shown(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 are written as numbers."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _open(item: _Item, channels: int, window: Window | None) -> Example:
    return Example(item.name, read_image(item.path, channels, window), item.label)

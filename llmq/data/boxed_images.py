"""What data sets of images with boxes share: an image's facts, boxes that lie within it, and the examples."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from llmq.data.images import Example, Lazily, make_split, read_image, size_of_file
from llmq.data.pixels import Window
from llmq.errors import UserError
from llmq.types import Split

ROUNDING = 1.0  # pixels that a box may reach out of its image, as files that were rounded do; it is clipped
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Boxed:
    """One annotation: its box and label; the object's `area` where the file says so, and whether it is a crowd."""

    box: Box
    label: int
    area: float | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Item:
    """An image file and what is annotated in it, in its pixels."""

    name: str
    path: Path
    annotations: tuple[Boxed, ...]


@dataclass(frozen=True)
class Part:
    """The images of one annotation file or folder, and what was left out of it."""

    items: list[Item]
    classes: tuple[str, ...]
    left_out: dict[str, int]


def within(box: Sequence[float], width: float, height: float, where: str) -> Box | None:
    """A box clipped to its image; None for one without area. Raises `UserError` for one that reaches out of it."""
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)) or x1 < x0 or y1 < y0:
        raise UserError(f"{where} has no finite, positive size")
    if x0 < -ROUNDING or y0 < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING:
        raise UserError(
            f"{where} spans x {x0:g} to {x1:g} and y {y0:g} to {y1:g}, outside its image of {width:g} x {height:g} "
            "pixels; clip it, or see whether it is meant for another image"
        )
    clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


def facts(path: Path) -> tuple[int, int, str]:
    """Width, height and SHA-256 of an image file. Raises `UserError` if it is no readable image."""
    about = path.stat()
    return _facts(path, about.st_size, about.st_mtime_ns)


@cache
def _facts(path: Path, size: int, changed: int) -> tuple[int, int, str]:
    # Size and time of change are there for the cache.
    width, height, turned = size_of_file(path)
    if turned != 1:
        raise UserError(
            f"{path}: is to be turned when it is shown (EXIF orientation {turned}), and boxes may be meant either way; "
            "turn its pixels, and save it without"
        )
    return width, height, hashlib.sha256(path.read_bytes()).hexdigest()


def divided(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Training and held-out images by the hash of their content, so that copies of an image are never on both sides."""
    order = sorted(items, key=lambda item: (facts(item.path)[2], item.name))
    wanted = round(share * len(order))
    last = facts(order[wanted - 1].path)[2] if wanted else ""
    held_out = [item for item in order if facts(item.path)[2] <= last]
    return order[len(held_out) :], held_out


def split_of(
    train: Sequence[Item],
    held_out: Sequence[Item],
    classes: Sequence[str],
    left_out: dict[str, int],
    window: Window | None = None,
) -> Split:
    """The split, its images opened when they are asked for, deep ones through `window`.

    Raises `UserError` where an image is on both sides.
    """
    seen = {facts(item.path)[2]: item for item in train}
    both = next((item for item in held_out if facts(item.path)[2] in seen), None)
    if both:
        other = seen[facts(both.path)[2]].path
        raise UserError(f"{both.path}: the same image as {other}, which is to be learned from; leave one of them out")
    digest = list(_digest("train", train)) + list(_digest("held_out", held_out))
    if window:
        digest.append(f"window {window}")
    opened = partial(_open, window=window)
    split = make_split(Lazily(train, opened), Lazily(held_out, opened), "image/boxes", digest, classes)
    counts = {**split.counts, **left_out}
    return Split(split.train, split.held_out, split.shape, counts, split.sha256, split.classes)


def _digest(side: str, items: Sequence[Item]) -> Iterator[str]:
    return (f"{side} {i.name} {facts(i.path)[2]} {i.annotations}" for i in items)


def without_copies(annotations: Sequence[Boxed], left_out: dict[str, int]) -> tuple[Boxed, ...]:
    """Annotations without those that say the very same of an image again, which are counted in `left_out`."""
    once = {(a.box, a.label, a.crowd): a for a in reversed(annotations)}  # of copies the first
    if copies := len(annotations) - len(once):
        left_out["copies_left_out"] = left_out.get("copies_left_out", 0) + copies
    return tuple(reversed(once.values()))


def _open(item: Item, window: Window | None) -> Example:
    import numpy as np

    image: Any = read_image(item.path, window=window)
    objects, crowds = ([a for a in item.annotations if a.crowd is crowd] for crowd in (False, True))
    columns: Any = [
        (np.array([a.box for a in some], np.float32).reshape(-1, 4), np.array([a.label for a in some], np.int64))
        for some in (objects, crowds)
    ]
    areas: Any = np.array([size_of(a) for a in objects], np.float64)
    (boxes, labels), (regions, crowd_labels) = columns
    return Example(item.name, image, boxes=boxes, labels=labels, areas=areas, crowds=regions, crowd_labels=crowd_labels)


def size_of(annotation: Boxed) -> float:
    """The area of an object, in square pixels: as annotated, else that of its box."""
    x0, y0, x1, y1 = annotation.box
    return (x1 - x0) * (y1 - y0) if annotation.area is None else annotation.area

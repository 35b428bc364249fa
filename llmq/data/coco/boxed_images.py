"""Images with boxes: sizes and hashes of images, checks of boxes, and the examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.types import Split
from llmq.vision import images
from llmq.vision.images import Example, Lazily, make_split, read_image

if TYPE_CHECKING:
    from pathlib import Path

    from llmq.vision.pixels import Window

ROUNDING = 1.0  # pixels that a box may reach out of the image, as rounded coordinates do; then the box is clipped
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Boxed:
    """One annotation: its box and label; the object's `area` where the file says so, and a mark for crowds."""

    box: Box
    label: int
    area: float | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Item:
    """An image file, and the annotations in pixels."""

    name: str
    path: Path
    annotations: tuple[Boxed, ...]


@dataclass(frozen=True)
class Part:
    """The images of one annotation file or folder, and the counts of annotations that were left out."""

    items: list[Item]
    classes: tuple[str, ...]
    left_out: dict[str, int]


def within(box: Sequence[float], width: float, height: float, where: str) -> Box | None:
    """The box clipped to the image, or None without area. Raises `UserError` for a box beyond the image."""
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)) or x1 < x0 or y1 < y0:
        raise UserError(f"{where} has no finite, positive size")
    if x0 < -ROUNDING or y0 < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING:
        raise UserError(
            f"{where} spans x {x0:g} to {x1:g} and y {y0:g} to {y1:g}, outside its image of {width:g} x {height:g} "
            "pixels; clip it, or look for the image that it belongs to"
        )
    clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


def facts(path: Path) -> tuple[int, int, str]:
    """Width, height and SHA-256 of an image file. Raises `UserError` if it is no readable image."""
    width, height, turned, sha256 = images.facts(path)
    if turned != 1:
        raise UserError(
            f"{path}: is to be turned when it is shown (EXIF orientation {turned}), and boxes may be meant either way; "
            "turn its pixels, and save it without"
        )
    return width, height, sha256


def _hash(item: Item) -> str:
    return facts(item.path)[2]


def divided(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Divide images by the hash of their content, so that copies of one image are on one side."""
    order = sorted(items, key=lambda item: (_hash(item), item.name))
    wanted = round(share * len(order))
    last = _hash(order[wanted - 1]) if wanted else ""
    held_out = [item for item in order if _hash(item) <= last]
    return order[len(held_out) :], held_out


def split_of(
    train: Sequence[Item],
    held_out: Sequence[Item],
    classes: Sequence[str],
    left_out: dict[str, int],
    window: Window | None = None,
) -> Split:
    """The split; an image is opened at each access, and `window` turns a deep one into bytes.

    Raises `UserError` where an image is on both sides.
    """
    seen = {_hash(item): item.path for item in train}
    if both := next((item for item in held_out if _hash(item) in seen), None):
        other = seen[_hash(both)]
        raise UserError(f"{both.path}: the same image as {other}, which is to be learned from; leave one of them out")
    digest = [*_digest("train", train), *_digest("held_out", held_out)]
    digest += [f"window {window}"] if window else []
    opened = partial(_open, window=window)
    split = make_split(Lazily(train, opened), Lazily(held_out, opened), "image/boxes", digest, classes)
    return replace(split, counts={**split.counts, **left_out})


def _digest(side: str, items: Sequence[Item]) -> Iterator[str]:
    return (f"{side} {item.name} {_hash(item)} {item.annotations}" for item in items)


def without_copies(annotations: Sequence[Boxed], left_out: dict[str, int]) -> tuple[Boxed, ...]:
    """Leave out annotations that repeat box, label and crowd of another one of their image, and count them."""
    once = {(a.box, a.label, a.crowd): a for a in reversed(annotations)}  # of copies the first stays
    if copies := len(annotations) - len(once):
        left_out["copies_left_out"] = left_out.get("copies_left_out", 0) + copies
    return tuple(reversed(once.values()))


def _open(item: Item, window: Window | None) -> Example:
    import numpy as np

    objects, crowds = ([a for a in item.annotations if a.crowd is crowd] for crowd in (False, True))
    (boxes, labels), (regions, crowd_labels) = (
        (np.array([a.box for a in some], np.float32).reshape(-1, 4), np.array([a.label for a in some], np.int64))
        for some in (objects, crowds)
    )
    areas = np.array([_area(a) for a in objects], np.float64)
    image = read_image(item.path, window=window)
    return Example(item.name, image, None, boxes, labels, None, areas, regions, crowd_labels)


def _area(annotation: Boxed) -> float:
    x0, y0, x1, y1 = annotation.box
    return (x1 - x0) * (y1 - y0) if annotation.area is None else annotation.area

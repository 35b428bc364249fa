"""COCO's average precision in numpy. Each image is matched by itself, so that any image can be left out of the figure.

The protocol is that of pycocotools (Lin et al. 2014). Detections come by falling score; each takes the free box of its
class with the largest overlap. Precision is made monotone and read at 101 levels of recall. Classes without a box do
not count. An object has the annotated area, a detection the area of its box. A detection in a crowd is neither right
nor wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from llmq.vision.detector import Detections
    from llmq.vision.images import Example

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
LEVELS = np.linspace(0, 1, 101)
MOST = 100  # detections of a class in an image


class Truth(NamedTuple):
    """All annotations of an image, crowds last."""

    boxes: ndarray  # (n, 4)
    labels: ndarray  # (n,)
    areas: ndarray  # (n,), in square pixels
    crowded: ndarray  # (n,), True for a crowd

    @classmethod
    def of(cls, example: Example) -> Truth:
        """The annotations of an example. Crowds, and objects without an annotated area, have the area of their box."""
        boxes, labels = example.boxes, example.labels
        areas = sizes_of(boxes) if example.areas is None else example.areas
        if example.crowds is None:
            return cls(boxes, labels, areas, np.zeros(len(boxes), bool))
        return cls(
            np.concatenate([boxes, example.crowds]),
            np.concatenate([labels, example.crowd_labels]),
            np.concatenate([areas, sizes_of(example.crowds)]),
            np.repeat([False, True], [len(boxes), len(example.crowds)]),
        )


@dataclass(frozen=True)
class Match:
    """The detections of one image, with the hits and the ignored ones at each threshold, and the boxes to be found."""

    labels: ndarray  # (n,)
    scores: ndarray  # (n,)
    hits: ndarray  # (thresholds, n)
    ignored: ndarray  # (thresholds, n)
    wanted: ndarray  # (boxes,), the label of each box that counts

    @classmethod
    def of(
        cls,
        example: Example,
        detections: Detections,
        thresholds: Sequence[float] = THRESHOLDS,
        area: tuple[float, float] = AREAS["all"],
    ) -> Match:
        """Match detections with the annotations of an example, of which those within `area` (square pixels) count.

        No detector has to find a crowd, and detections in a crowd are neither right nor wrong.
        """
        truth = Truth.of(example)
        outside = truth.crowded | ~_within(truth.areas, area)
        none: ndarray = np.zeros((len(thresholds), 0), bool)
        parts: list[tuple[ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.float32), none, none)]
        for label in np.unique(detections.labels):
            best = np.flatnonzero(detections.labels == label)
            best = best[np.argsort(-detections.scores[best], kind="stable")][:MOST]
            true = np.flatnonzero(truth.labels == label)
            true = true[np.argsort(outside[true], kind="stable")]  # those that count come first
            overlaps = overlap(detections.boxes[best], truth.boxes[true], truth.crowded[true])  # (detections, boxes)
            hits, ignored = _assigned(overlaps, outside[true], truth.crowded[true], np.asarray(thresholds))
            ignored |= ~hits & ~_within(sizes_of(detections.boxes[best]), area)
            parts.append((detections.labels[best], detections.scores[best], hits, ignored))
        labels, scores, hits, ignored = (
            np.concatenate(column, -1) for column in zip(*(parts[1:] or parts), strict=True)
        )
        return cls(labels, scores, hits, ignored, truth.labels[~outside])

    def at(self, threshold: int) -> Match:
        """The match at one threshold alone, given by number."""
        row = slice(threshold, threshold + 1)
        return Match(self.labels, self.scores, self.hits[row], self.ignored[row], self.wanted)


def sizes_of(boxes: ndarray) -> ndarray:
    """The areas `(n,)` of boxes `(n, 4)`, in square pixels."""
    boxes = np.asarray(boxes, np.float64)
    made: ndarray = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return made


def _within(sizes: ndarray, area: tuple[float, float]) -> ndarray:
    made: ndarray = (sizes >= area[0]) & (sizes <= area[1])
    return made


def overlap(a: ndarray, b: ndarray, crowded: ndarray | bool = False) -> ndarray:
    """Intersection over union of every box of `a` `(n, 4)` with every box of `b` `(m, 4)`: `(n, m)`.

    Where `crowded` `(m,)` marks a box of `b`, the divisor is the area of the box of `a` instead of the union.
    """
    own, others = sizes_of(a)[:, None], sizes_of(b)[None]  # (n, 1), (1, m)
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (n, m, 2)
    common = sides.clip(0).prod(-1)
    either = np.where(crowded, own, own + others - common)
    made: ndarray = np.divide(common, either, out=np.zeros_like(common), where=either > 0)
    return made


def _assigned(overlaps: ndarray, outside: ndarray, crowded: ndarray, thresholds: ndarray) -> tuple[ndarray, ndarray]:
    """The detections (rows, best first) that hit a box, and those of them whose box does not count."""
    hits: ndarray = np.zeros((len(thresholds), len(overlaps)), bool)  # (thresholds, detections), like `ignored`
    ignored = np.zeros_like(hits)
    free: ndarray = np.ones((len(thresholds), len(outside)), bool)  # (thresholds, boxes)
    rows = np.arange(len(thresholds))
    for d in np.flatnonzero(overlaps.max(1, initial=0) >= thresholds[0]):
        # A box that counts is taken before any that does not, whatever the overlap; of equal ones the last.
        worth = np.where(free & (overlaps[d] >= thresholds[:, None]), overlaps[d] - 2.0 * outside + 3, 0)
        taken = len(outside) - 1 - worth[:, ::-1].argmax(1)  # (thresholds,)
        hits[:, d] = worth[rows, taken] > 0
        ignored[:, d] = hits[:, d] & outside[taken]
        free[rows, taken] &= ~hits[:, d] | crowded[taken]  # a crowd takes any number of detections
    return hits, ignored


def mean_average_precision(matches: Sequence[Match]) -> float:
    """The mean over classes and thresholds; NaN where no box counts."""
    values = [_precision(*_table(matches, label)[:3]) for label in _classes(matches)]
    return float(np.mean(values)) if values else float("nan")


def influences(matches: Sequence[Match], value: float, groups: int) -> ndarray | None:
    """The influence of each of `groups` of images on `value`: `(groups,)` numbers whose mean is `value`.

    Image i is in group i % groups. None where one group has all boxes: without that group there is no figure.

    Delete-a-group jackknife (Shao & Tu 1995, ch. 2.3): value + (g - 1)(mean of the values without a group - the value
    without this one). Their standard deviation over the root of `groups` is the jackknife's standard error.
    """
    without = np.array([_without_each(matches, label, groups) for label in _classes(matches)])  # (classes, groups)
    counted = ~np.isnan(without)
    if not counted.any(0).all():
        return None
    left_out = np.where(counted, without, 0).sum(0) / counted.sum(0)
    made: ndarray = value + (groups - 1) * (left_out.mean() - left_out)
    return made


def _classes(matches: Sequence[Match]) -> ndarray:
    made: ndarray = np.unique(np.concatenate([match.wanted for match in matches]))
    return made


def _table(matches: Sequence[Match], label: int) -> tuple[ndarray, ndarray, int, ndarray, ndarray]:
    """The table of one class, best score first: hits, ignored, number of boxes, images of detections and boxes."""
    kept = [match.labels == label for match in matches]
    order = np.argsort(-np.concatenate([m.scores[k] for m, k in zip(matches, kept, strict=True)]), kind="stable")
    hits = np.concatenate([m.hits[:, k] for m, k in zip(matches, kept, strict=True)], 1)[:, order]
    ignored = np.concatenate([m.ignored[:, k] for m, k in zip(matches, kept, strict=True)], 1)[:, order]
    images = np.repeat(np.arange(len(matches)), [k.sum() for k in kept])[order]  # (detections,)
    boxes: ndarray = np.repeat(np.arange(len(matches)), [(m.wanted == label).sum() for m in matches])
    return hits, ignored, len(boxes), images, boxes


def _precision(hits: ndarray, ignored: ndarray, wanted: int) -> float:
    """The average precision of one class, the mean over thresholds; NaN without a box."""
    if not wanted:
        return float("nan")
    right = np.cumsum(hits & ~ignored, 1)
    wrong = np.cumsum(~hits & ~ignored, 1)
    precision = right / (right + wrong + np.spacing(1))  # (thresholds, detections)
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # the best at this recall or above
    precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is never reached
    places = [np.searchsorted(recall, LEVELS, "left") for recall in right / wanted]
    return float(np.mean([row[at] for row, at in zip(precision, places, strict=True)]))


def _without_each(matches: Sequence[Match], label: int, groups: int) -> ndarray:
    hits, ignored, wanted, images, boxes = _table(matches, label)
    lost = np.bincount(boxes % groups, minlength=groups)  # (groups,), boxes
    said = np.bincount(images % groups, minlength=groups)  # (groups,), detections
    result = np.full(groups, _precision(hits, ignored, wanted))
    for g in np.flatnonzero(lost + said):  # leaving out any other group changes nothing
        rest = images % groups != g
        result[g] = _precision(hits[:, rest], ignored[:, rest], wanted - lost[g])
    return result

"""COCO's average precision in numpy: what each image contributes, so that images can be left out one at a time.

The protocol is that of pycocotools (Lin et al. 2014): detections, best score first, take the free box of their class
that they overlap most; precision is made monotone and read at 101 levels of recall; classes without a box do not count.
How large an object is the annotation says; a detection in a crowd, by its own area, is neither right nor wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
LEVELS = np.linspace(0, 1, 101)
MOST = 100  # detections of a class in an image


@dataclass(frozen=True)
class Match:
    """One image: its detections, whether each hit or is ignored at each threshold, and the boxes to be found.

    `labels` and `scores` `(n,)`; `hits` and `ignored` `(thresholds, n)`; `wanted` the label of each box that counts.
    """

    labels: Any
    scores: Any
    hits: Any
    ignored: Any
    wanted: Any

    @classmethod
    def of(
        cls,
        boxes: Any,
        labels: Any,
        found: Any,
        thresholds: Sequence[float] = THRESHOLDS,
        area: tuple[float, float] = AREAS["all"],
        areas: Any = None,
        crowds: Any = None,
        crowd_labels: Any = None,
    ) -> "Match":
        """Set `found` (boxes, scores, labels) beside the true boxes, those within `area` (square pixels) counting.

        `areas` `(n,)` says how large the objects are, if not as large as their boxes. Of `crowds` `(m, 4)` none is to
        be found, and what lies in one is neither right nor wrong, however much does.
        """
        counts = _within(sizes_of(boxes) if areas is None else areas, area)
        wanted = labels[counts]
        crowded: Any = np.zeros(len(boxes), bool)
        if crowds is not None and len(crowds):
            boxes, labels = np.concatenate([boxes, crowds]), np.concatenate([labels, crowd_labels])
            counts = np.concatenate([counts, np.zeros(len(crowds), bool)])
            crowded = np.concatenate([crowded, np.ones(len(crowds), bool)])
        outside = ~counts
        parts: list[Any] = []
        for label in np.unique(found.labels):
            best = np.flatnonzero(found.labels == label)
            best = best[np.argsort(-found.scores[best], kind="stable")][:MOST]
            true = np.flatnonzero(labels == label)
            true = true[np.argsort(outside[true], kind="stable")]
            overlaps = overlap(found.boxes[best], boxes[true], crowded[true])
            hits, ignored = _assigned(overlaps, outside[true], crowded[true], np.asarray(thresholds))
            ignored |= ~hits & ~_within(sizes_of(found.boxes[best]), area)
            parts.append((found.labels[best], found.scores[best], hits, ignored))
        if not parts:
            none: Any = np.zeros((len(thresholds), 0), bool)
            parts = [(np.zeros(0, np.int64), np.zeros(0, np.float32), none, none)]
        columns: Any = [np.concatenate(column, -1) for column in zip(*parts, strict=True)]
        return cls(columns[0], columns[1], columns[2], columns[3], wanted)

    @classmethod
    def in_example(
        cls,
        example: Any,
        found: Any,
        thresholds: Sequence[float] = THRESHOLDS,
        area: tuple[float, float] = AREAS["all"],
    ) -> "Match":
        """Set `found` beside all that is known of an example: boxes, areas and crowds."""
        e = example
        return cls.of(e.boxes, e.labels, found, thresholds, area, e.areas, e.crowds, e.crowd_labels)

    def at(self, threshold: int) -> "Match":
        """The same image at one of its thresholds, by number."""
        row = slice(threshold, threshold + 1)
        return Match(self.labels, self.scores, self.hits[row], self.ignored[row], self.wanted)


def sizes_of(boxes: Any) -> Any:
    """The area of each of `(n, 4)` boxes."""
    boxes = np.asarray(boxes, np.float64)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _within(sizes: Any, area: tuple[float, float]) -> Any:
    return (sizes >= area[0]) & (sizes <= area[1])


def overlap(a: Any, b: Any, crowded: Any = False) -> Any:
    """Intersection over union of every box of `a` `(n, 4)` with every box of `b` `(m, 4)`: `(n, m)`.

    With those of `b` that are `crowded` `(m,)`: intersection over the box of `a`.
    """
    own, others = sizes_of(a)[:, None], sizes_of(b)[None]
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    either = np.where(crowded, own, own + others - common)
    return np.divide(common, either, out=np.zeros_like(common), where=either > 0)


def _assigned(overlaps: Any, outside: Any, crowded: Any, thresholds: Any) -> tuple[Any, Any]:
    """Which detections (rows, best first) hit a box, and whether that box does not count: two of `(thresholds, n)`."""
    hits: Any = np.zeros((len(thresholds), len(overlaps)), bool)
    ignored = np.zeros_like(hits)
    free: Any = np.ones((len(thresholds), len(outside)), bool)
    rows = np.arange(len(thresholds))
    for d in np.flatnonzero(overlaps.max(1, initial=0) >= thresholds[0]):
        # A box that counts is taken before any that does not, whatever the overlap; of equal ones the last.
        worth = np.where(free & (overlaps[d] >= thresholds[:, None]), overlaps[d] - 2.0 * outside + 3, 0)
        taken = len(outside) - 1 - worth[:, ::-1].argmax(1)
        hits[:, d] = worth[rows, taken] > 0
        ignored[:, d] = hits[:, d] & outside[taken]
        free[rows, taken] &= ~hits[:, d] | crowded[taken]
    return hits, ignored


def mean_average_precision(matches: Sequence[Match]) -> float:
    """The mean over classes and thresholds; NaN where there is no box to be found."""
    return _mean([_precision(*_table(matches, label)[:3]) for label in _classes(matches)])


def influences(matches: Sequence[Match], value: float, groups: int) -> Any | None:
    """What each of `groups` of images does to `value`: `(groups,)` numbers whose mean it is; i is in group i % groups.

    None where one group has all boxes, so that there is no figure without it.

    Delete-a-group jackknife (Shao & Tu 1995, ch. 2.3): value + (g - 1)(mean of the values without a group - the value
    without this one). Their standard deviation over the root of `groups` is the jackknife's standard error.
    """
    without = np.array([_without_each(matches, label, groups) for label in _classes(matches)])
    counted = ~np.isnan(without)
    if not counted.any(0).all():
        return None
    left_out = np.where(counted, without, 0).sum(0) / counted.sum(0)
    return value + (groups - 1) * (left_out.mean() - left_out)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _classes(matches: Sequence[Match]) -> Any:
    return np.unique(np.concatenate([match.wanted for match in matches]))


def _table(matches: Sequence[Match], label: int) -> tuple[Any, Any, int, Any, Any]:
    """Of one class, best score first: hits, ignored, number of boxes, image of each detection and of each box."""
    kept = [match.labels == label for match in matches]
    order = np.argsort(-np.concatenate([m.scores[k] for m, k in zip(matches, kept, strict=True)]), kind="stable")
    hits = np.concatenate([m.hits[:, k] for m, k in zip(matches, kept, strict=True)], 1)[:, order]
    ignored = np.concatenate([m.ignored[:, k] for m, k in zip(matches, kept, strict=True)], 1)[:, order]
    images = np.repeat(np.arange(len(matches)), [k.sum() for k in kept])[order]
    boxes: Any = np.repeat(np.arange(len(matches)), [(m.wanted == label).sum() for m in matches])
    return hits, ignored, len(boxes), images, boxes


def _precision(hits: Any, ignored: Any, wanted: int) -> float:
    """Average precision of one class, the mean over thresholds."""
    if not wanted:
        return float("nan")
    right = np.cumsum(hits & ~ignored, 1)
    wrong = np.cumsum(~hits & ~ignored, 1)
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # a recall that is never reached
    places = [np.searchsorted(recall, LEVELS, "left") for recall in right / wanted]
    return float(np.mean([row[at] for row, at in zip(precision, places, strict=True)]))


def _without_each(matches: Sequence[Match], label: int, groups: int) -> Any:
    hits, ignored, wanted, images, boxes = _table(matches, label)
    lost = np.bincount(boxes % groups, minlength=groups)
    said = np.bincount(images % groups, minlength=groups)
    result = np.full(groups, _precision(hits, ignored, wanted))
    for g in np.flatnonzero(lost + said):
        rest = images % groups != g
        result[g] = _precision(hits[:, rest], ignored[:, rest], wanted - lost[g])
    return result

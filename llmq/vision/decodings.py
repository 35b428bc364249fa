"""The outputs of exported detectors as boxes, scores and labels: one function for each layout that is in use.

A function takes the graph's outputs for some images and the rows and columns of the input. It returns, for each image,
boxes `(k, 4)` as x0, y0, x1, y1 in pixels of the input, scores `(k,)` and labels `(k,)`. Nothing is selected yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Raw = tuple["Tensor", ...]
Side = tuple[int, int]
"""The rows and columns of the input."""
Found = list[tuple["Tensor", "Tensor", "Tensor"]]


@dataclass(frozen=True)
class Decoding:
    """A layout of outputs: in words, the number of classes that shapes tell (0: none), and the function."""

    layout: str
    classes: Callable[[Sequence[Sequence[int]]], int | None]
    decode: Callable[[Raw, Side], Found]
    nms: bool = True
    """True where boxes overlap, and non-maximum suppression must follow."""

    def class_count(self, shapes: Sequence[Sequence[int]], file: str) -> int:
        """The number of classes; 0 where shapes do not tell. Raises `UserError` for outputs of another layout."""
        count = self.classes(shapes)
        if count is None or count < 0:
            there = ", ".join(str(list(shape)) for shape in shapes)
            raise UserError(f"{file!r} answers with {there} for one image, and this decoding needs {self.layout}")
        return count


def _corners(boxes: Tensor) -> Tensor:
    """Boxes `(…, 4)` of centre, width and height as corners."""
    import torch

    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _in_pixels(boxes: Tensor, side: Side) -> Tensor:
    """Boxes `(…, 4)` in shares of the input, in pixels."""
    import torch

    return boxes * torch.tensor([side[1], side[0], side[1], side[0]])


def _best(boxes: Tensor, scores: Tensor) -> Found:
    """Each box `(n, k, 4)` with the best of its classes `(n, k, classes)`."""
    best, labels = scores.max(-1)
    return list(zip(boxes, best, labels, strict=True))


def yolov5(raw: Raw, side: Side) -> Found:
    """YOLOv5 to v7 (ultralytics/yolov5 `models/yolo.py`, `Detect`): rows of centre, size, objectness, classes.

    All are in pixels, or chances after the sigmoid; the score is objectness times class.
    """
    (rows,) = raw  # (n, k, 5 + classes)
    return _best(_corners(rows[..., :4]), rows[..., 4:5] * rows[..., 5:])


def yolov8(raw: Raw, side: Side) -> Found:
    """YOLOv8, 11, 12 (ultralytics `nn/modules/head.py`, `Detect`): columns of centre, size, classes; no objectness."""
    (columns,) = raw  # (n, 4 + classes, k)
    rows = columns.transpose(1, 2)
    return _best(_corners(rows[..., :4]), rows[..., 4:])


def fastestdet(raw: Raw, side: Side) -> Found:
    """FastestDet (dog-qiuqiu/FastestDet `utils/tool.py`, `handle_preds`): one box for each place of one map.

    The map holds objectness, place and size before tanh and sigmoid, and classes after the softmax.
    """
    import torch

    (maps,) = raw  # (n, 5 + classes, rows, columns)
    rows, columns = maps.shape[2:]
    places = maps.flatten(2).transpose(1, 2)  # (n, rows * columns, 5 + classes)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corner = torch.stack([x.flatten(), y.flatten()], -1)  # (rows * columns, 2)
    centre = (places[..., 1:3].tanh() + corner) / torch.tensor([columns, rows])
    boxes = _corners(torch.cat([centre, places[..., 3:5].sigmoid()], -1))
    best, labels = places[..., 5:].max(-1)
    scores = places[..., 0] ** 0.6 * best**0.4
    return list(zip(_in_pixels(boxes, side), scores, labels, strict=True))


def ssd(raw: Raw, side: Side) -> Found:
    """SSD (qfgaohao/pytorch-ssd, exported for testing): chances with the background first, corners in shares."""
    scores, boxes = _by_width(raw)  # (n, k, 1 + classes), (n, k, 4)
    return _best(_in_pixels(boxes, side), scores[..., 1:])


def detr(raw: Raw, side: Side) -> Found:
    """DETR (Carion et al. 2020) and YOLOS: logits with no object last, centre and size in shares of the input."""
    logits, boxes = _by_width(raw)  # (n, queries, classes + 1), (n, queries, 4)
    return _best(_in_pixels(_corners(boxes), side), logits.softmax(-1)[..., :-1])


def rtdetr(raw: Raw, side: Side) -> Found:
    """RT-DETR (Zhao et al. 2024) and D-FINE: a sigmoid for each class, centre and size in shares of the input.

    The best pairs of query and class are taken, as many as there are queries.
    """
    logits, boxes = _by_width(raw)  # (n, queries, classes), (n, queries, 4)
    queries, classes = logits.shape[1:]
    scores, pairs = logits.sigmoid().flatten(1).topk(queries)  # (n, queries)
    corners = _in_pixels(_corners(boxes), side)
    return [(b[pair // classes], s, pair % classes) for b, s, pair in zip(corners, scores, pairs, strict=True)]


def boxes(raw: Raw, side: Side) -> Found:
    """Boxes that the graph has selected: rows of corners in pixels, score and label, in one output or in three."""
    if len(raw) == 1:
        rows = raw[0]  # (n, k, 6)
        return [(r[:, :4], r[:, 4], r[:, 5].long()) for r in rows]
    corners, scores, labels = raw  # (k, 4), (k,), (k,) of one image; or with an axis of images before
    if corners.ndim == 2:
        return [(corners, scores, labels.long())]
    return list(zip(corners, scores, labels.long(), strict=True))


def _by_width(raw: Raw) -> tuple[Tensor, Tensor]:
    """The output with classes and the output with boxes; of two that are 4 wide the boxes come last."""
    one, other = raw
    return (other, one) if one.shape[-1] == 4 and other.shape[-1] != 4 else (one, other)


def _one(ndim: int, axis: int, less: int) -> Callable[[Sequence[Sequence[int]]], int | None]:
    """One output, whose axis holds `less` numbers and the classes."""

    def classes(shapes: Sequence[Sequence[int]]) -> int | None:
        fits = len(shapes) == 1 and len(shapes[0]) == ndim and shapes[0][axis] > less
        return shapes[0][axis] - less if fits else None

    return classes


def _two(less: int) -> Callable[[Sequence[Sequence[int]]], int | None]:
    """Scores and boxes with one row each; the rows of scores hold `less` numbers and the classes."""

    def classes(shapes: Sequence[Sequence[int]]) -> int | None:
        if len(shapes) != 2 or any(len(shape) != 3 for shape in shapes) or shapes[0][1] != shapes[1][1]:
            return None
        widths = [shape[2] for shape in shapes]
        if 4 not in widths:
            return None
        count = (widths[1] if widths[0] == 4 and widths[1] != 4 else widths[0]) - less
        return count if count > 0 else None

    return classes


def _selected(shapes: Sequence[Sequence[int]]) -> int | None:
    if len(shapes) == 1:
        return 0 if len(shapes[0]) == 3 and shapes[0][2] == 6 else None
    corners = [shape for shape in shapes if len(shape) in (2, 3) and shape[-1] == 4]
    return 0 if len(shapes) == 3 and len(corners) == 1 else None


DECODINGS: Mapping[str, Decoding] = {
    "yolov5": Decoding("one output [images, boxes, 5 + classes]", _one(3, 2, 5), yolov5),
    "yolov8": (columns := Decoding("one output [images, 4 + classes, boxes]", _one(3, 1, 4), yolov8)),
    "yolo11": columns,
    "fastestdet": Decoding("one output [images, 5 + classes, rows, columns]", _one(4, 1, 5), fastestdet),
    "ssd": Decoding("[images, boxes, 1 + classes] and [images, boxes, 4]", _two(1), ssd),
    "detr": Decoding("[images, queries, classes + 1] and [images, queries, 4]", _two(1), detr, nms=False),
    "rtdetr": (queries := Decoding("[images, queries, classes] and [images, queries, 4]", _two(0), rtdetr, nms=False)),
    "dfine": queries,
    "boxes": Decoding("[images, boxes, 6], or boxes [boxes, 4], scores and labels", _selected, boxes, nms=False),
}


def selected(found: Found, least: float, overlap: float | None, most: int) -> Found:
    """The best `most` of each image with a score of at least `least`; of boxes of one class that overlap, the best.

    With no `overlap` boxes may lie on one another.
    """
    import torch
    from torchvision.ops import batched_nms

    made: Found = []
    for corners, scores, labels in found:
        kept = torch.nonzero(scores >= least).flatten()
        order = scores[kept].argsort(descending=True, stable=True)
        kept = kept[order]
        if overlap is not None:
            kept = kept[batched_nms(corners[kept], scores[kept], labels[kept], overlap)]
        kept = kept[:most]
        made.append((corners[kept], scores[kept], labels[kept]))
    return made

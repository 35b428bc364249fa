"""Detections drawn on images: the truth in green, what was found in orange."""

from collections.abc import Sequence
from typing import Any

from llmq.tasks.pictures import panels, png, show

TRUTH, FOUND = "#2fbf71", "#ff8c1a"
COLUMNS = 3


def picture(shown: Sequence[tuple[Any, Any]], classes: Sequence[str], shown_from: float) -> bytes:
    """Examples with their detections, as PNG; detections below a score of `shown_from` are left out."""
    rows = -(-len(shown) // COLUMNS)
    figure, axes = panels(rows, min(COLUMNS, len(shown)), 3.2, 3.3)
    for panel, (example, found) in zip(axes.ravel(), shown, strict=False):
        drawn = found.scores >= shown_from
        show(panel, example.image, f"{example.name}: {len(example.boxes)} there, {int(drawn.sum())} found")
        for box, label in zip(example.boxes, example.labels, strict=True):
            _draw(panel, box, _name(classes, label), TRUTH, "bottom")
        for box, label, score in zip(found.boxes[drawn], found.labels[drawn], found.scores[drawn], strict=True):
            _draw(panel, box, f"{_name(classes, label)} {score:.2f}", FOUND, "top")
    return png(figure)


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


def _draw(panel: Any, box: Any, text: str, colour: str, side: str) -> None:
    from matplotlib.patches import Rectangle

    # A pixel's middle is its whole number, a box's edge lies between two.
    x0, y0, x1, y1 = (float(v) - 0.5 for v in box)
    panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
    place = {"bottom": (x0, y0), "top": (x0, y1)}[side]
    panel.text(*place, text, color=colour, fontsize=6.5, va=side, clip_on=True)

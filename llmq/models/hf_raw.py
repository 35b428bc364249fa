"""A detector of transformers that maps one tensor to its logits and boxes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class RawDetector(nn.Module):  # type: ignore[misc]
    """Pixels `(n, 3, height, width)` to logits `(n, queries, classes)` and boxes `(n, queries, 4)`.

    Boxes are centre, width and height as shares of the image.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Any) -> tuple[Any, Any]:
        """Logits and boxes alone."""
        outputs = self.model(pixel_values=pixels)
        return outputs.logits, outputs.pred_boxes

    def criterion(self, size: int) -> Callable[[Any, Any], Any]:
        """`(images, targets)` to the loss of transformers, targets in pixels of a square of `size`."""

        def loss(images: Any, targets: Any) -> Any:
            labels = [
                {"class_labels": target["labels"], "boxes": _centred(target["boxes"]) / size} for target in targets
            ]
            return self.model(pixel_values=images, labels=labels).loss

        return loss


def _centred(boxes: Any) -> Any:
    """Corners `(n, 4)` as centre, width and height."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)

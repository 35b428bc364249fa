"""A classifier of transformers that maps one tensor to one tensor."""

from typing import Any

from torch import nn


class Logits(nn.Module):  # type: ignore[misc]
    """Pixels `(n, channels, height, width)` to logits `(n, classes)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Any) -> Any:
        """The logits alone."""
        return self.model(pixel_values=pixels).logits

"""Pictures that a task shows: figures as PNG, in one style."""

import io
from collections.abc import Sequence
from typing import Any

INK = "#1f2933"


def png(figure: Any, dpi: int = 110) -> bytes:
    """A matplotlib figure as PNG; the same figure gives the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its 2-D array of panels without ticks and frames, each `width` x `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.ravel():
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    return figure, axes


def show(panel: Any, image: Any, title: str = "") -> None:
    """An image uint8 `(height, width, channels)` in a panel, pixel by pixel, under its title."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    panel.imshow(flat, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set_title(title, fontsize=8.5, color=INK)


def show_differences(
    figure: Any, axes: Sequence[Any], differences: Sequence[Any], titles: Sequence[str], top: float | None = None
) -> None:
    """Absolute differences `(height, width)` in grey levels, all on one scale with one colour bar.

    The scale ends at `top`, or the 99.5th percentile of the largest: one bad pixel does not blacken the rest.
    """
    import numpy as np

    end = max(1.0, *(float(np.percentile(d, 99.5)) for d in differences)) if top is None else max(1.0, top)
    for panel, difference, title in zip(axes, differences, titles, strict=True):
        drawn = panel.imshow(difference, cmap="magma", vmin=0, vmax=end, interpolation="nearest")
        panel.set_title(title, fontsize=8.5, color=INK)
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.85, pad=0.01)
    bar.set_label("grey levels of 255", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)

"""The pictures that tasks show: figures as PNG, in one style."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import ndarray

INK = "#1f2933"


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A matplotlib figure as PNG; the same figure gives the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})  # without a version
    return data.getvalue()


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its array `(rows, columns)` of panels without ticks and frames, each `width` x `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)  # an array even for one panel
    for panel in axes.ravel():
        panel.set(xticks=[], yticks=[])  # images need no axes
        panel.spines[:].set_visible(False)
    return figure, axes


def show(panel: Axes, image: ndarray, title: str = "") -> None:
    """Draw a uint8 image `(height, width, channels)` pixel by pixel, under a title."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image  # (height, width) if grey
    panel.imshow(flat, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set_title(title, fontsize=8.5, color=INK)


def show_differences(
    figure: Figure,
    axes: Sequence[Axes],
    differences: Sequence[ndarray],
    titles: Sequence[str],
    top: float | None = None,
) -> None:
    """Draw absolute differences `(height, width)` in grey levels, all on one scale with one colour bar.

    The scale ends at `top`, or else at the largest 99.5th percentile: one bad pixel does not blacken the rest.
    """
    import numpy as np

    end = max(1.0, max(float(np.percentile(d, 99.5)) for d in differences) if top is None else top)
    for panel, difference, title in zip(axes, differences, titles, strict=True):
        drawn = panel.imshow(difference, cmap="magma", vmin=0, vmax=end, interpolation="nearest")
        panel.set_title(title, fontsize=8.5, color=INK)
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.85, pad=0.01)
    bar.set_label("grey levels of 255", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)


def show_axes(panel: Axes, title: str) -> None:
    """Give a panel that shows curves axes, a legend and a title."""
    from matplotlib.ticker import MaxNLocator

    panel.set_title(title, fontsize=8.5)
    panel.spines[["left", "bottom"]].set_visible(True)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    panel.tick_params(labelsize=7)
    panel.legend(frameon=False, fontsize=7.5)

"""The picture of a sweep over one setting: each figure with its 95 % interval, from one value to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.report.drawing import BASE, STAGES, as_svg, plain_text

Curve = Mapping[float, tuple[float, tuple[float, float] | None]]
"""By value of the setting: the figure, and its interval where one is known."""


@dataclass(frozen=True)
class Panel:
    """One figure over a setting; `base` is that of the stage before, a dotted line. Bytes are drawn as MB."""

    title: str
    setting: str
    curve: Curve
    base: float | None = None
    unit: str = ""


def draw(shown: Sequence[Panel]) -> str:
    """The picture as SVG, a panel for each figure."""
    import matplotlib
    from matplotlib.figure import Figure

    with plain_text(), matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
        panels: Any = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip(panels, shown, strict=False):
            curve, places = panel.curve, sorted(panel.curve)
            size = 1e-6 if panel.unit == "bytes" else 1.0
            values = [size * curve[x][0] for x in places]
            if panel.base is not None:
                axes.axhline(size * panel.base, color=BASE, lw=0.9, ls=":")
            axes.plot(places, values, "o-", color=STAGES[0], markersize=3.5, lw=1.2)
            for x in places:
                if interval := curve[x][1]:
                    axes.plot([x, x], [size * end for end in interval], color=BASE, lw=1.2)
            axes.set_title(f"{panel.title}{' (MB)' if panel.unit == 'bytes' else ''}", fontsize=9)
            axes.set_xlabel(panel.setting)
            axes.tick_params(labelsize=8)
        for empty in list(figure.axes)[len(shown) :]:
            empty.set_axis_off()
        return as_svg(figure)

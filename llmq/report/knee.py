"""The picture of a sweep over one setting: each figure with its 95 % interval, from one value to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmq.report.drawing import BASE, STAGES, as_svg, plain_text

Curve = Mapping[float, tuple[float, tuple[float, float] | None]]
"""By value of the setting: the figure, and its interval where one is known."""


def draw(curves: Sequence[tuple[str, str, Curve]]) -> str:
    """The picture as SVG, a panel for each (title, name of the setting, curve)."""
    import matplotlib
    from matplotlib.figure import Figure

    with plain_text(), matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        columns = min(3, len(curves))
        rows = -(-len(curves) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
        panels: Any = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, setting, curve) in zip(panels, curves, strict=False):
            places = sorted(curve)
            values = [curve[x][0] for x in places]
            axes.plot(places, values, "o-", color=STAGES[0], markersize=3.5, lw=1.2)
            for x in places:
                if interval := curve[x][1]:
                    axes.plot([x, x], interval, color=BASE, lw=1.2)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(setting)
            axes.tick_params(labelsize=8)
        for empty in list(figure.axes)[len(curves) :]:
            empty.set_axis_off()
        return as_svg(figure)

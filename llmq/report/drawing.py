"""What every picture of the page shares: its ink, its size, its text as text."""

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmq.report import Report

INK, BASE, STAGES = "#1f2933", "#7b8a97", ("#3b78e7", "#c8701a", "#0f9960", "#a855b5", "#d64545", "#00998c")
"""Ink, and the colours of the base and of stages, which stand out by 3 to 1 from the cards of either theme."""


def plain_text() -> "AbstractContextManager[None]":
    """A context of matplotlib in which `$` in a name begins no formula."""
    import matplotlib

    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return matplotlib.rc_context({"text.parse_math": False, "axes.labelsize": 9, **dict.fromkeys(keys, INK)})


def colours_of(report: "Report") -> dict[str, str]:
    """The colour of each stage; the first, untouched, is grey."""
    names = [s["name"] for s in report.stages]
    return {name: BASE if i == 0 else STAGES[(i - 1) % len(STAGES)] for i, name in enumerate(names)}


def blank(height: float, columns: int = 1) -> tuple["Figure", Any]:
    """A figure and its axes, or an array of axes side by side; all as wide as one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8.5)
    return figure, axes


def legend(figure: "Figure", axes: "Axes") -> None:
    """Name what the axes show, above them, where no name covers a point."""
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside upper left", ncols=2)


def as_svg(figure: "Figure") -> str:
    """A figure as text for the page, whose ink follows the theme."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set(facecolor="none", edgecolor="none")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmq"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # `savefig` draws twice, to the same text
    # Text stays text, in the font of the page; the XML head and the metadata have no place inside HTML.
    # The numbered names of parts come in every picture; nothing refers to them.
    unwanted = r"^.*?(?=<svg)|<metadata>.*?</metadata>|(?<=<g) id=\"[^\"]*_\d+\""
    inner = re.sub(unwanted, "", text.getvalue(), flags=re.DOTALL)
    return inner.replace(INK, "currentColor")  # light or dark, as the page is

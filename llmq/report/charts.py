"""The pictures of a report, as SVG text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmq.judge.protocols import QUALITY, SIZE, SPEED
from llmq.report.drawing import INK, as_svg, blank, colours_of, legend, plain_text
from llmq.types import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmq.report import Report

NEAR = 14
"""Pixels within which the numbers of two points would lie over each other."""


def draw(report: "Report") -> dict[str, str]:
    """Title -> SVG, for every picture that the report has the figures for."""
    with plain_text():
        pictures = {
            "Size against quality": _trade_off(report, (SIZE,), 1e-6, "MB on disk  (← smaller is better)", True),
            "Speed against quality": _trade_off(report, SPEED, 1.0, _speed_axis(report), False),
            "Training": _training(report),
        }
        return {title: svg for title, svg in pictures.items() if svg}


def _of(report: "Report", metrics: Sequence[str]) -> tuple[JsonObject, str]:
    """By stage, the first of the metrics that a task has found: of one task, as another's figure is of other things."""
    for metric in metrics:
        found = [m for m in report.measurements if m["metric"] == metric]
        if found:
            return {m["stage"]: m for m in found if m["task"] == found[0]["task"]}, metric
    return {}, ""


def _trade_off(report: "Report", metrics: Sequence[str], factor: float, axis: str, less: bool) -> str:
    """Quality against another figure, a point a stage, and the front of the stages that no other one beats in both."""
    others, _ = _of(report, metrics)
    quality, metric = _of(report, QUALITY)
    both = [s for s in report.measured if s in others and s in quality]
    if len(both) < 2:
        return ""
    figure, axes = blank(3.2)
    colours, better = colours_of(report), next(iter(quality.values()))["better"]
    points = {s: (others[s]["value"] * factor, quality[s]["value"]) for s in both}
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", color=colours[name], markersize=8, label=name)
    if better != "unknown" and (front := _front(list(points.values()), less, better == "lower")):
        axes.plot(*zip(*front, strict=True), "--", color=INK, lw=1, alpha=0.5, zorder=0)
    axes.set_xlim(0, 1.15 * max(x for x, _ in points.values()))
    errors = [quality[s]["stderr"] or 0.0 for s in both]  # no scale on which noise looks like a difference
    axes.update_datalim(
        [(0, y + e) for (_, y), error in zip(points.values(), errors, strict=True) for e in (-error, error)]
    )
    axes.margins(y=0.2)
    axes.autoscale_view(scalex=False)
    for number, point in _numbered(points, axes):  # the legend alone would tell stages apart by colour only
        axes.annotate(number, point, xytext=(6, 6), textcoords="offset points", fontsize=8.5)
    legend(figure, axes)
    axes.set_xlabel(axis)
    told = {"higher": "  (↑ higher is better)", "lower": "  (↓ lower is better)"}.get(better, "")
    axes.set_ylabel(f"{metric.replace('_', ' ')}{told}")
    return as_svg(figure)


def _numbered(points: Mapping[str, tuple[float, float]], axes: "Axes") -> list[tuple[str, tuple[float, float]]]:
    """The numbers of the stages at their points; one text for points so near that two would lie over each other."""
    texts: list[tuple[str, tuple[float, float]]] = []
    for name, point in points.items():
        number, dash, _ = name.partition("-")
        if not dash or not number.isdigit():
            continue
        place = axes.transData.transform(point)  # pixels
        for i, (others, at) in enumerate(texts):
            if abs(place - axes.transData.transform(at)).max() < NEAR:
                texts[i] = f"{others}, {number}", at
                break
        else:
            texts.append((number, point))
    return texts


def _speed_axis(report: "Report") -> str:
    metric = _of(report, SPEED)[1]
    return f"{metric.replace('_per_second', '').replace('_', ' ')} a second  (→ more is better)"


def _front(points: list[tuple[float, float]], less_x: bool, less_y: bool) -> list[tuple[float, float]]:
    """The points that no other one beats in both figures, by the first."""

    def beats(p: tuple[float, float], q: tuple[float, float]) -> bool:
        x, y = (p[0] - q[0]) * (-1 if less_x else 1), (p[1] - q[1]) * (-1 if less_y else 1)
        return x >= 0 and y >= 0 and x + y > 0

    return sorted(p for p in points if not any(beats(q, p) for q in points))


def _training(report: "Report") -> str:
    trained = [s for s in report.stages if s["notes"].get("training", {}).get("loss")]
    if not trained:
        return ""
    figure, axes = blank(3.2)
    colours = colours_of(report)
    metrics = list(dict.fromkeys(filter(None, (s["notes"]["training"].get("metric") for s in trained))))
    beside = axes.twinx() if metrics else None
    for stage in trained:
        curves, style = stage["notes"]["training"], {"color": colours[stage["name"]]}
        axes.plot(*zip(*curves["loss"], strict=True), **style, alpha=0.7, lw=1.2, label=f"{stage['name']}, training")
        if curves.get("held_out_loss"):
            held_out = zip(*curves["held_out_loss"], strict=True)
            axes.plot(*held_out, "o-", **style, lw=2, label=f"{stage['name']}, held-out")
        if beside and curves.get("held_out"):
            label = f"{stage['name']}, held-out"  # the axis names the metric, which would run out of the picture here
            beside.plot(*zip(*curves["held_out"], strict=True), "o-", **style, lw=2)
            axes.plot([], [], "o-", **style, lw=2, label=label)  # one legend for both scales
    axes.set_xlabel("step")
    units = dict.fromkeys(s["notes"]["training"].get("loss_unit", "nats a token") for s in trained)
    axes.set_ylabel(f"loss, {', '.join(units)}")
    if beside:
        beside.spines["top"].set_visible(False)
        beside.tick_params(labelsize=8.5)
        beside.set_ylabel(f"held-out {', '.join(metrics)}")
    legend(figure, axes)
    return as_svg(figure)

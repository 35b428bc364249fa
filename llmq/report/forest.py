"""The forest plot: every sampled figure of every stage beside the base, a line for each 95 % interval."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from llmq.report.numbers import difference_of, set_beside
from llmq.types import JsonObject


@dataclass(frozen=True)
class Line:
    """One comparison; `at`, `low` and `high` are places from left to right, in percent of the plot."""

    stage: str
    metric: str
    """The metric; with the task before it where several tasks take it."""
    at: float
    low: float
    high: float
    verdict: str
    told: str


@dataclass(frozen=True)
class Plot:
    """Lines on one scale: of ratios, or of differences in one unit."""

    title: str
    lines: Sequence[Line]
    zero: float
    """The place of no difference, in percent of the plot."""
    ticks: Sequence[tuple[float, str]]


def draw(
    measurements: Iterable[JsonObject],
    comparisons: Iterable[JsonObject],
    folded: Collection[str] = (),
    base: str = "the base",
) -> list[Plot]:
    """One plot of the ratios, and one of the differences of each unit that has no ratio; without `folded` metrics.

    Each comparison names the `stage` or the `result` that was set beside the base.
    """
    units = {(m["task"], m["metric"]): m["unit"] for m in measurements}
    tasks = Counter(metric for _, metric in units)
    groups: dict[tuple[str, bool], list[tuple[JsonObject, Sequence[float]]]] = {}
    for c in comparisons:
        unit = units[c["task"], c["metric"]]
        plain = difference_of(unit) or ((1.0, f" {unit}") if c["ratio"] is None else None)
        ends = c["ci95"] if plain else c["ratio_ci95"]
        if c["metric"] in folded or not ends or not ends[0] < ends[1] or (not plain and ends[0] <= 0):
            continue
        factor, name = plain or (1.0, "")
        title = f"Difference from {base},{name or ' as measured'}" if plain else f"Ratio to {base}"
        numbers = [factor * x for x in (c["difference"] if plain else c["ratio"], *ends)]
        label = c["metric"] if tasks[c["metric"]] == 1 else f"{c['task']} {c['metric']}"
        told = {**c, "unit": unit, "stage": c.get("stage") or c["result"], "label": label}
        groups.setdefault((title, not plain), []).append((told, numbers))
    return [_plot(title, ratios, found) for (title, ratios), found in groups.items()]


def _plot(title: str, ratios: bool, found: Sequence[tuple[JsonObject, Sequence[float]]]) -> Plot:
    middle = 1.0 if ratios else 0.0
    least = min([middle, *(numbers[1] for _, numbers in found)])
    most = max([middle, *(numbers[2] for _, numbers in found)])
    warp: Callable[[float], float] = math.log if ratios else float
    span = (warp(most) - warp(least)) or 1.0

    def place(value: float) -> float:
        return round(100 * (warp(value) - warp(least)) / span, 2)

    lines = [
        Line(c["stage"], c["label"], place(at), place(low), place(high), c["verdict"], set_beside(c, c["unit"]))
        for c, (at, low, high) in found
    ]
    ticks = {place(value): _tick(value, ratios) for value in (least, most)}
    ticks = {at: text for at, text in ticks.items() if abs(at - place(middle)) > NEAR}  # or they would overlap
    return Plot(title, lines, place(middle), sorted({**ticks, place(middle): _tick(middle, ratios)}.items()))


NEAR = 20
"""Percent of a plot within which the text of two ticks would overlap."""


def _tick(value: float, ratio: bool) -> str:
    return f"{value:.2f}×" if ratio else f"{value:+.3g}" if value else "0"

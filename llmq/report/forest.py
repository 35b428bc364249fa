"""The forest plot: every sampled figure of every stage beside the base, a line for each 95 % interval."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from llmq.report.numbers import DIFFERENCES, set_beside

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 300, 190, 24, 8  # pixels: all, names, figures, a row, the margin
Line = tuple[str, float, float, float, str, str]
"""Name, value, lower end, upper end, verdict, and the text beside."""


def draw(measurements: Iterable[Mapping[str, Any]], comparisons: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Title -> SVG: one picture of the ratios, one of the differences of each unit that has no ratio.

    Each comparison names the `stage` or the `result` that was set beside the base.
    """
    units = {(m["task"], m["metric"]): m["unit"] for m in measurements}
    groups: dict[str, list[Line]] = {}
    for c in comparisons:
        unit = units[c["task"], c["metric"]]
        plain = unit in DIFFERENCES or c["ratio"] is None
        ends = c["ci95"] if plain else c["ratio_ci95"]
        if not ends or not ends[0] < ends[1] or (not plain and ends[0] <= 0):
            continue
        factor, name = DIFFERENCES.get(unit, (1.0, f" {unit}")) if plain else (1.0, "ratio to the base")
        value = c["difference"] * factor if plain else c["ratio"]
        title = f"Difference from the base,{name or ' as measured'}" if plain else "Ratio to the base"
        line = (
            f"{c.get('stage') or c['result']}  {c['metric']}",
            value,
            ends[0] * factor,
            ends[1] * factor,
            c["verdict"],
        )
        groups.setdefault(title, []).append((*line, set_beside(c, unit)))
    return {title: _svg(title, lines, title.startswith("Ratio")) for title, lines in groups.items()}


def _svg(title: str, lines: Sequence[Line], ratios: bool) -> str:
    middle = 1.0 if ratios else 0.0
    low, high = min([middle, *(line[2] for line in lines)]), max([middle, *(line[3] for line in lines)])
    warp: Callable[[float], float] = math.log if ratios else float
    span = (warp(high) - warp(low)) or 1.0

    def x(value: float) -> float:
        return LEFT + 12 + (warp(value) - warp(low)) / span * (WIDTH - LEFT - RIGHT - 24)

    height = TOP + ROW * len(lines) + 30
    told = "; ".join(f"{line[0]}: {line[5]} ({line[4]})" for line in lines)
    parts = [
        f'<svg class="forest" viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}: {escape(told)}</title>',
        f'<line class="zero" x1="{x(middle):.1f}" x2="{x(middle):.1f}" y1="{TOP}" y2="{height - 22}"/>',
        *(part for i, line in enumerate(lines) for part in _row(line, TOP + ROW * i + ROW / 2, x)),
        *(
            f'<text class="tick" x="{x(v):.1f}" y="{height - 6}" text-anchor="middle">{_tick(v, ratios)}</text>'
            for v in sorted({low, middle, high})
        ),
        "</svg>",
    ]
    return "".join(parts)


def _row(line: Line, y: float, x: Callable[[float], float]) -> Iterator[str]:
    name, value, low, high, verdict, told = line
    yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
    yield f'<g class="{escape(verdict)}"><line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    yield f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="4.5"/></g>'
    yield f'<text class="told" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{escape(told)}</text>'


def _tick(value: float, ratio: bool) -> str:
    return f"{value:.2f}×" if ratio else f"{value:+.3g}" if value else "0"

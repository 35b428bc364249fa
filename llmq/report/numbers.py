"""Figures as text: scaled, rounded, set beside the base."""

from collections.abc import Callable, Sequence

from llmq.types import JsonObject, in_points

SCALES = {"bytes": (1e-6, "MB"), "parameters": (1e-6, "M")}
"""The factor by which figures of a unit are shown, and the unit that they are shown in."""
POINTS = (100.0, " pt")
DIFFERENCES = {"dB": (1.0, " dB"), "": (1.0, "")}
"""Units, besides shares, of which a difference is shown and no ratio: the factor, and the name."""

ALIKE = "the same on every sample"


def is_alike(c: JsonObject) -> bool:
    """True where every sample is the same, which leaves the interval of the difference wide."""
    return bool(c["verdict"] == "same" and c["ci95"] and c["ci95"][0] < c["ci95"][1])


def set_beside(comparison: JsonObject, unit: str) -> str:
    """The ratio to the base, or the difference where a ratio means nothing; either with the 95 % interval."""
    plain = difference_of(unit)
    if plain or comparison["ratio"] is None:
        factor, name = plain or (scaled(unit)[0], "")
        return f"{signed(comparison['difference'] * factor)}{name}{interval(comparison['ci95'], factor, signed)}"
    ends = comparison["ratio_ci95"]
    if comparison["verdict"] == "same" and ends and ends[0] == ends[1]:  # a size within the tolerance, counted
        return times(round(comparison["ratio"], 2), None, "×")
    return times(comparison["ratio"], ends, "×")


def times(ratio: float, ends: Sequence[float] | None, sign: str, least: int = 2) -> str:
    """A ratio and its interval with `least` digits behind the point, or as many more as tell it from 0 and from 1.

    So an interval that leaves out 1 is never shown with an end of 1.00.
    """
    low, high = ends or (ratio, ratio)
    apart = min(abs(end - 1) for end in (low, high)) if low > 1 or high < 1 else 1.0
    digits = next((d for d in range(least, 6) if apart >= 0.5 * 10.0**-d), 6)

    def shown(value: float) -> str:
        return f"{value:.{digits}f}" if 0.1 <= value < 1000 or value == 0 else number(value)

    return f"{shown(ratio)}{sign}{interval(ends, 1.0, shown)}"


def difference_of(unit: str) -> tuple[float, str] | None:
    """The factor and the name of a difference of figures of a unit; None where a ratio says more."""
    return POINTS if in_points(unit) else DIFFERENCES.get(unit)


def interval(ends: Sequence[float] | None, factor: float, shown: Callable[[float], str]) -> str:
    """The two ends in brackets; nothing for a counted figure, whose ends are one."""
    return f" [{shown(ends[0] * factor)}, {shown(ends[1] * factor)}]" if ends and ends[0] < ends[1] else ""


def scaled(unit: str) -> tuple[float, str]:
    """The factor and the unit by which figures of a unit are shown."""
    return SCALES.get(unit, (1.0, unit))


def signed(value: float) -> str:
    """A number with its sign; 0 has none."""
    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{number(abs(value))}"


def number(value: float) -> str:
    """A number with three or four significant digits, and an exponent only under 0.001 and from a billion on."""
    size = abs(value)
    if size >= 1e9:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{digits}f}" if size >= 0.001 or size == 0 else f"{value:.1e}"

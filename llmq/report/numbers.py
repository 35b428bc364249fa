"""Figures as text: scaled, rounded, set beside the base."""

from collections.abc import Callable, Sequence

from llmq.types import JsonObject

SCALES = {"bytes": (1e-6, "MB"), "parameters": (1e-6, "M")}
"""The factor by which figures of a unit are shown, and the unit that they are shown in."""
DIFFERENCES = {"dB": (1.0, " dB"), "share": (100.0, " pt"), "probability": (100.0, " pt"), "": (1.0, "")}
"""Units of which a difference is shown and no ratio: the factor, and the name (pt: percent points)."""

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
    return f"{_times(comparison['ratio'])}×{interval(comparison['ratio_ci95'], 1.0, _times)}"


def _times(ratio: float) -> str:
    """Two digits behind the point; a model that was destroyed may be many powers of ten away."""
    return f"{ratio:.2f}" if ratio < 1000 else number(ratio)


def difference_of(unit: str) -> tuple[float, str] | None:
    """The factor and the name of a difference of figures of a unit; None where a ratio says more."""
    return DIFFERENCES.get("share" if unit.startswith("share ") else unit)


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

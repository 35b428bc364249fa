"""What was foretold of a run beside what was measured of it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.errors import in_bytes
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.report import Report

BOUNDS = {"on disk": 1.02, "peak of the step": 1.15, "peak of speed": 1.15, "peak of all tasks": 1.15, "time": 1.5}
"""The ratio, or its inverse, within which a figure was foretold well."""
SMALL = 32_000_000
"""Bytes of memory; a difference below lies in what libraries keep for themselves, and is not judged."""


def lines(report: "Report") -> Iterator[tuple[str, str]]:
    """One entry a stage, and one for the time of all."""
    if not report.foretold:
        return
    told = {stage["name"]: stage for stage in report.foretold["stages"]}
    for stage in report.stages:
        if text := "; ".join(_of_stage(report, stage, told.get(stage["name"], {}))):
            yield stage["name"], text
    expected, taken = report.foretold["seconds"], report.seconds
    if expected and taken and not any(stage["reused"] for stage in report.stages):
        yield "all stages", _beside("time", expected, taken)


def _of_stage(report: "Report", stage: JsonObject, told: JsonObject) -> Iterator[str]:
    figures = {(m["task"], m["metric"]): m["value"] for m in report.measurements if m["stage"] == stage["name"]}
    speed = (told.get("tasks") or {}).get("speed") or {}
    pairs = (
        ("on disk", told.get("bytes_on_disk"), figures.get(("size", "bytes_on_disk"))),
        ("peak of the step", told.get("peak_of_step"), stage["notes"].get("peak_memory")),
        ("peak of speed", speed.get("peak_memory"), figures.get(("speed", "peak_memory"))),
        ("peak of all tasks", told.get("peak_of_tasks"), (stage.get("asked") or {}).get("peak_memory")),
        ("time", told.get("seconds_of_step"), stage["seconds"]),
    )
    kept = {"peak of speed": "speed" in stage["reused"], "peak of all tasks": bool(stage["reused"])}
    for what, expected, measured in pairs:
        if expected and measured and not kept.get(what):  # answers of an earlier run took nothing of this one
            yield _beside(what, expected, measured)


def _beside(what: str, expected: float, measured: float) -> str:
    """`on disk 131.5 MB, measured 131.5 MB (1.00x)`; a figure beyond its bound is said to be so."""
    ratio, bound = expected / measured, BOUNDS[what]
    shown = (f"{n:,.1f} s" if what == "time" else in_bytes(n) for n in (expected, measured))
    near = what.startswith("peak") and abs(expected - measured) < SMALL
    missed = "" if near or 1 / bound <= ratio <= bound else f", beyond {bound:g}x"
    first, second = shown
    return f"{what} {first}, measured {second} ({ratio:.2f}x{missed})"

"""The table that every face of the report shows: a row a metric, a column a stage."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmq.estimates import FEWEST
from llmq.report import Report
from llmq.types import Measurement

TOLD = {"unknown": "direction unknown"}
MARKS = {"better": "▲", "worse": "▼", "same": "=", "undecided": "?"}
ARROWS = {"higher": "↑", "lower": "↓"}
"""Of a figure whose direction is unknown there is none."""
LEGEND = (
    "▲ better, ▼ worse than the base, = the same samples, ? undecided: the 95 % interval of the paired difference "
    "contains 0, or would if all comparisons of the table were to hold at once (Holm), or there are fewer than "
    f"{FEWEST} pairs. No mark: not compared, or the direction is unknown. ×: ratio to the base. ±: one standard error."
)


TITLE = "What it cost"
HEADLINE = (
    "bytes_on_disk",
    "token_perplexity",
    "acc",
    "top1",
    "map",
    "frechet_distance",
    "psnr",
    "decode_tokens_per_second",
    "images_per_second",
)


@dataclass(frozen=True)
class Cell:
    """One figure as shown: its value, its ratio to the base, and the verdict."""

    value: str
    ratio: str = ""
    verdict: str = ""

    @property
    def mark(self) -> str:
        """The mark of the verdict; none where there is no verdict."""
        return MARKS.get(self.verdict, "")

    def __str__(self) -> str:
        return " ".join(x for x in (self.value, self.ratio, self.mark) if x)


@dataclass(frozen=True)
class Row:
    """One metric over all stages."""

    task: str
    metric: str
    unit: str
    better: str
    convention: str
    cells: tuple[Cell, ...]

    @property
    def arrow(self) -> str:
        """Where better lies, if that is known."""
        return ARROWS.get(self.better, "")

    @property
    def label(self) -> str:
        """The metric, its unit and its arrow."""
        return " ".join(filter(None, (self.metric, f"({self.unit})" if self.unit else "", self.arrow)))


def rows(report: Report) -> Iterator[Row]:
    """The rows in the order in which tasks first spoke, those of one task together."""
    stages = report.measured
    found = {(m["stage"], m["task"], m["metric"]): m for m in report.measurements}
    compared = {(c["stage"], c["task"], c["metric"]): c for c in report.comparisons}
    tasks = list(dict.fromkeys(m["task"] for m in report.measurements))
    named = dict.fromkeys((m["task"], m["metric"]) for m in report.measurements)
    for task, metric in sorted(named, key=lambda name: tasks.index(name[0])):
        shown = [found.get((s, task, metric)) for s in stages]
        first = next(m for m in shown if m)
        cells = tuple(_cell(m, compared.get((s, task, metric))) for s, m in zip(stages, shown, strict=True))
        unit = "MB" if first["unit"] == "bytes" else "M" if first["unit"] == "parameters" else first["unit"]
        yield Row(task, metric, unit, first["better"], _conventions(filter(None, shown)), cells)


def _conventions(measurements: Iterable[Mapping[str, Any]]) -> str:
    """How a figure was taken; with the stages' names where it was not taken alike of all."""
    stages: dict[str, list[str]] = {}
    for m in measurements:
        stages.setdefault(m["convention"], []).append(m["stage"])
    if len(stages) == 1:
        return next(iter(stages))
    return " | ".join(f"{', '.join(names)}: {convention}" for convention, names in stages.items())


def _cell(measurement: Mapping[str, Any] | None, comparison: Mapping[str, Any] | None) -> Cell:
    if measurement is None:
        return Cell("—")
    scale = 1e-6 if measurement["unit"] in ("bytes", "parameters") else 1.0
    value = number(measurement["value"] * scale)
    if measurement["stderr"]:
        value += f" ± {number(measurement['stderr'] * scale)}"
    if comparison is None:
        return Cell(value)
    ratio = f"{comparison['ratio']:.2f}×" if comparison["ratio"] is not None else ""
    return Cell(value, ratio, comparison["verdict"])


def number(value: float) -> str:
    """Three or four significant digits, no exponent where a person would not write one."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{digits}f}" if size >= 0.001 or size == 0 else f"{value:.1e}"


def alarms(report: Report) -> list[str]:
    """One line for each task that failed at a stage, and for each step that did not do what it is for."""
    found = [f"FINDING: {s['name']}: {s['notes']['finding']}" for s in report.stages if "finding" in s["notes"]]
    return [f"FAILED: {f['stage']}: {f['task']}: {f['error']}" for f in report.failures] + found


def summary(report: Report) -> list[str]:
    """One line an alarm; one line a stage: the ratios to the base that most people look for first."""
    lines = alarms(report)
    for name in report.measured[1:]:
        found: dict[str, str] = {}
        for c in report.comparisons:
            if c["stage"] == name and c["metric"] in HEADLINE and c["ratio"] is not None:
                told = TOLD.get(c["verdict"], c["verdict"])
                of_size = c["metric"] == "bytes_on_disk" and _stored_otherwise(report, name)
                told += f"; {of_size}" if of_size else ""
                found.setdefault(c["metric"], f"{c['metric'].replace('_', ' ')} {c['ratio']:.2f}× ({told})")
        lines.append(f"{name}: {', '.join(found[m] for m in HEADLINE if m in found) or 'nothing to compare'}")
    return lines


def notes(report: Report) -> list[str]:
    """What the table's marks and ratios leave unsaid: other dtypes, documents without a pair, what is not compared."""
    lines = [f"TRUSTED: {line}" for line in report.environment.get("trusted", ())]
    for name in report.measured[1:]:
        if said := _stored_otherwise(report, name):
            lines.append(f"{name}: {said}: its ratios of sizes compare both what was done to it and how it is stored")
    said_of: dict[tuple[str, str, str], list[str]] = {}
    for c in report.comparisons:
        if said := unsaid(c):
            said_of.setdefault((c["stage"], c["task"], said), []).append(c["metric"])
    for r in report.refused:
        said_of.setdefault((r["stage"], r["task"], f"not compared: {r['reason']}"), []).append(r["metric"])
    return lines + [f"{stage}: {task} {', '.join(m)}: {said}" for (stage, task, said), m in said_of.items()]


def unsaid(c: Mapping[str, Any]) -> str:
    """Which documents of a comparison have no pair, and why nothing was decided; of a single figure that is plain."""
    reason = c.get("reason", "") if c.get("n") != 1 else ""
    return "; ".join(filter(None, (left_out(c), reason)))


def left_out(c: Mapping[str, Any]) -> str:
    """Which documents of a comparison or of a gate's verdict have no pair, or nothing."""
    if not (c.get("only_stage") or c.get("only_base")):
        return ""
    return (
        f"judged on the {c['n']:,} documents that both scored; left out: {c['only_stage']:,} that only the stage "
        f"scored, {c['only_base']:,} that only the base scored"
    )


def is_size(m: Measurement) -> bool:
    """Whether a figure counts bytes that a dtype makes more or fewer."""
    return m.exact and m.unit == "bytes"


def _stored_otherwise(report: Report, name: str) -> str:
    stored = {s["name"]: s.get("stored", "") for s in report.stages}
    return stored_otherwise(stored[name], stored[report.measured[0]])


def stored_otherwise(stage: str, base: str) -> str:
    """The dtypes that a stage and the base are stored in, where a part of their ratio of sizes is theirs; or nothing.

    Packed weights beside a base of 4 bytes a weight are told too: beside one of 2 their ratio would be twice as large.
    """
    packed, _, floats = stage.rpartition(" and ")
    wide = base in ("float32", "float64")
    if not (base and stage) or (floats == base and not (packed and wide)):
        return ""
    return f"stored as {stage}, the base as {base}"

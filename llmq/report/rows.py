"""The rows that every format of a report or a comparison shows: a row a metric, a column a stage; and notes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import TYPE_CHECKING

from llmq.judge.protocols import HEADLINE, SIZE, is_size, stored_otherwise
from llmq.report.facts import left_out
from llmq.report.numbers import ALIKE, difference_of, interval, is_alike, number, scaled, set_beside, signed
from llmq.statistics.estimates import FEWEST
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.judge.comparisons import Comparisons
    from llmq.report import Report
    from llmq.statistics.compare import Comparison

TOLD = {"unknown": "direction unknown"}
MARKS = {"better": "▲", "worse": "▼", "same": "=", "undecided": "?"}
ARROWS = {"higher": "↑", "lower": "↓"}
"""The arrow of the better direction; an unknown direction has none."""
LEGEND = (
    "▲ better, ▼ worse than the base, = the same samples, ? undecided: the 95 % interval of the paired difference "
    "contains 0, or would if all comparisons of the table were to hold at once (Holm), or there are fewer than "
    f"{FEWEST} pairs. No mark: not compared, or the direction is unknown. ×: ratio to the base; dB, pt: difference "
    "from it; [ ]: the 95 % interval of either. ±: one standard error. Sizes within 0.1 % are the same."
)
COMPARISON_LEGEND = (
    "Each figure with its difference from the first column and the 95 % interval of that difference, from pairs of the "
    "same samples. ▲ better, ▼ worse, = the same samples, ? undecided: the interval contains 0, or would if all "
    "comparisons of the table were to hold at once (Holm), or there are too few pairs. sees: the smallest true "
    "difference that 4 of 5 such samples show."
)
AGREEMENT = 0.9
"""The share of equal classes below which an image classifier is no longer the one that it was made from."""
LOST: Mapping[str, tuple[float, float]] = {
    "token_perplexity": (0, 1.5), "map": (0.9, inf), "top1": (0.9, inf), "acc": (0.9, inf)
}  # fmt: skip
"""The least and the greatest ratio to the base within which a worse figure is a price, and beyond it a failure."""
FLOORS = 2
"""The Fréchet distance from the base, in distances of two sets of the base's own images, that is a failure."""
FOLDED = frozenset({
    "bytes_in_memory", "parameters", "nonzeros", "sparse_bytes", "word_perplexity", "byte_perplexity", "latency_p95",
    "peak_memory_of_process", "map75", "map_small", "map_medium", "map_large", "top5", "bicubic_psnr", "bicubic_ssim",
    "bicubic_porosity", "connected_porosity", "true_connected_porosity", "bicubic_connected_porosity", "euler_number",
    "true_euler_number", "bicubic_euler_number", "specific_surface", "true_specific_surface",
    "bicubic_specific_surface", "pore_size", "true_pore_size", "bicubic_pore_size", "otsu_threshold",
    "true_otsu_threshold", "bicubic_otsu_threshold", "frechet_distance_other_latents",
})  # fmt: skip
"""Metrics that matter to few; the page shows them at a click."""


@dataclass(frozen=True)
class Cell:
    """One figure as shown: the value, the ratio to or difference from the base, and the verdict."""

    value: str
    beside: str = ""
    verdict: str = ""

    @property
    def mark(self) -> str:
        """The mark of the verdict; empty without one."""
        return MARKS.get(self.verdict, "")

    def __str__(self) -> str:
        return " ".join(x for x in (self.value, self.beside, self.mark) if x)


@dataclass(frozen=True)
class Row:
    """One metric over all stages."""

    task: str
    metric: str
    unit: str
    better: str
    convention: str
    cells: tuple[Cell, ...]
    sees: str = ""
    """The smallest true difference that 4 of 5 such samples show."""

    @property
    def folded(self) -> bool:
        """True for a row that says the same of all stages, or that matters to few."""
        verdicts = {c.verdict for c in self.cells if c.verdict}
        return self.metric in FOLDED or verdicts == {"same"}

    @property
    def arrow(self) -> str:
        """The arrow of the better direction; empty if it is unknown."""
        return ARROWS.get(self.better, "")

    @property
    def label(self) -> str:
        """The metric with unit and arrow."""
        return " ".join(filter(None, (self.metric, f"({self.unit})" if self.unit else "", self.arrow)))


def rows(report: "Report") -> Iterator[Row]:
    """The rows in the order in which tasks first answered, those of one task together."""
    found = {(m["stage"], m["task"], m["metric"]): m for m in report.measurements}
    compared = {(c["stage"], c["task"], c["metric"]): c for c in report.comparisons}
    beside: set[tuple[str, str]] = set()  # bicubic's figures, under names of their own
    for (stage, task, metric), c in compared.items():
        if stage not in report.measured:
            beside.add((task, f"{stage}_{metric}"))
            found[stage, task, metric] = {**found[c["against"], task, f"{stage}_{metric}"], "stage": stage}
    tasks = list(dict.fromkeys(m["task"] for m in report.measurements))
    named = dict.fromkeys((m["task"], m["metric"]) for m in report.measurements)
    for task, metric in sorted((n for n in named if n not in beside), key=lambda name: tasks.index(name[0])):
        shown = [found.get((s, task, metric)) for s in report.columns]
        first = next(m for m in shown if m)
        cells = tuple(_cell(m, compared.get((s, task, metric))) for s, m in zip(report.columns, shown, strict=True))
        unit = scaled(first["unit"])[1]
        yield Row(task, metric, unit, first["better"], _conventions(filter(None, shown)), cells)


def _conventions(measurements: Iterable[JsonObject]) -> str:
    """The protocol of a figure; where stages differ, the protocol of each by name."""
    stages: dict[str, list[str]] = {}
    for m in measurements:
        stages.setdefault(m["convention"], []).append(m["stage"])
    if len(stages) == 1:
        return next(iter(stages))
    return " | ".join(f"{', '.join(names)}: {convention}" for convention, names in stages.items())


def _cell(measurement: JsonObject | None, comparison: JsonObject | None) -> Cell:
    if measurement is None:
        return Cell("—")
    scale = scaled(measurement["unit"])[0]
    value = number(measurement["value"] * scale)
    if measurement["stderr"]:
        value += f" ± {number(measurement['stderr'] * scale)}"
    return (
        Cell(value, set_beside(comparison, measurement["unit"]), comparison["verdict"]) if comparison else Cell(value)
    )


def compared_rows(compared: "Comparisons") -> Iterator[Row]:
    """The figures that any result shares with the first, each with the difference from the first."""
    first, *others = compared.results
    known = {(name, c.task, c.metric): c for name, c in compared.comparisons}
    for (task, metric), base in first.figures.items():
        found = [known.get((other.name, task, metric)) for other in others]
        if any(found):
            scale, unit = scaled(base.unit)
            factor, name = difference_of(base.unit) or (scale, "")
            cells = [
                _difference(c, number(o.figures[task, metric].value * scale), factor, name) if c else Cell("—")
                for c, o in zip(found, others, strict=True)
            ]
            seen = max((c.detectable for c in found if c and c.detectable), default=0.0)
            sees = f"±{number(seen * factor)}" if seen else ""
            value = Cell(number(base.value * scale))
            yield Row(task, metric, unit, base.better, base.convention, (value, *cells), sees)


def _difference(c: "Comparison", value: str, factor: float, name: str) -> Cell:
    told = f"{signed(c.difference * factor)}{name}{interval(c.ci95, factor, signed)}"
    return Cell(f"{value} ", told, c.verdict)


def comparison_notes(compared: "Comparisons") -> Iterator[str]:
    """The lines below a comparison: documents without a pair, other dtypes, and figures that are not compared."""
    first, *others = compared.results
    for name, c in compared.comparisons:
        if said := unsaid(asdict(c)):
            yield f"{name}: {c.task} {c.metric}: {said}"
    sized = {name for name, c in compared.comparisons if is_size(first.figures[c.task, c.metric])}
    for other in others:
        if other.name in sized and (said := stored_otherwise(other.stored, first.stored)):
            yield f"{other.name}: {said}"
    refused: dict[tuple[str, str, str], list[str]] = {}
    for r in compared.refusals:
        refused.setdefault((r.result, r.task, r.reason), []).append(r.metric)
    for (result, task, reason), metrics in refused.items():
        yield f"not compared: {result}: {task} {', '.join(metrics)}: {reason}"


def alarms(report: "Report") -> list[str]:
    """One line for each task that failed at a stage, for each finding about a step, and for each useless result."""
    found = [f"FINDING: {s['name']}: {s['notes']['finding']}" for s in report.stages if "finding" in s["notes"]]
    return (
        [f"FAILED: {f['stage']}: {f['task']}: {f['error']}" for f in report.failures] + found + list(_useless(report))
    )


def _useless(report: "Report") -> Iterator[str]:
    figures = {(m["stage"], m["task"], m["metric"]): m["value"] for m in report.measurements}
    better = {(c["stage"], c["task"], c["metric"]) for c in report.comparisons if c["verdict"] == "better"}
    for m in report.measurements:
        is_result = m["stage"] != report.measured[0] or len(report.measured) == 1  # a base may be untrained
        if m["metric"] == "psnr_gain" and m["value"] < 0 and is_result:
            yield f"BAD: {m['stage']}: its images are {-m['value']:.2f} dB below plain bicubic interpolation"
        is_accuracy = m["task"].partition(" ")[0] == "accuracy"  # "accuracy (photos)" of several
        is_apart = m["metric"] == "top1_agreement" and m["value"] < AGREEMENT
        if is_accuracy and is_apart and (m["stage"], m["task"], "top1") not in better:
            others = f"{1 - m['value']:.0%} of {m['n']:,} images"
            yield f"BAD: {m['stage']}: it gives another class than the base to {others}"
        floor = figures.get((m["stage"], m["task"], "frechet_floor"))
        from_base = (report.measured[0], m["task"], "frechet_distance") not in figures
        if m["metric"] == "frechet_distance" and from_base and floor and m["value"] > FLOORS * floor:
            seen = f"a Fréchet distance of {number(m['value'])} from the base's"
            yield f"BAD: {m['stage']}: its images have {seen}, two sets of the base's own {number(floor)}"
    for c in report.comparisons:
        least, most = LOST.get(c["metric"], (0, inf))
        if c["verdict"] == "worse" and c["ratio"] is not None and not least <= c["ratio"] <= most:
            now, was = (number(figures[name, c["task"], c["metric"]]) for name in (c["stage"], c["against"]))
            yield f"BAD: {c['stage']}: {c['task']} {c['metric'].replace('_', ' ')} {now}, of the base {was}"


def summary(report: "Report") -> list[str]:
    """One line an alarm; one line a stage: the figures beside the base that most people look for first."""
    return alarms(report) + [f"{name}: {', '.join(_headline(report, name))}" for name in report.measured[1:]]


def _headline(report: "Report", name: str) -> list[str]:
    units = {(m["task"], m["metric"]): m["unit"] for m in report.measurements}
    base = {m["metric"] for m in report.measurements if m["stage"] == report.measured[0]}
    found: dict[str, str] = {}
    for c in report.comparisons:
        if c["stage"] == name:
            told = TOLD.get(str(c["verdict"]), str(c["verdict"]))
            told = ALIKE if is_alike(c) else told
            of_size = c["metric"] == SIZE and _stored_otherwise(report, name)
            told += f"; {of_size}" if of_size else ""
            found.setdefault(c["metric"], f"{set_beside(c, units[c['task'], c['metric']])} ({told})")
    # Figures that the base has none of are distances from it, but where a task failed there.
    against = "; the base has no such figure" if report.lacks_base else " against the base"
    for m in report.measurements:
        if m["stage"] == name and m["metric"] not in base:
            scale, unit = scaled(m["unit"])
            told = f", by {m['task']}" if report.told_by_step(m) else against
            found.setdefault(m["metric"], " ".join(f"{number(m['value'] * scale)} {unit}{told}".split()))
    return [f"{m.replace('_', ' ')} {found[m]}" for m in HEADLINE if m in found] or ["nothing to compare"]


def notes(report: "Report") -> list[str]:
    """The lines below the table: other dtypes, documents without a pair, figures that are not compared."""
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


def exhibits(report: "Report") -> dict[str, list[dict[str, str]]]:
    """The outputs of all stages for the same input, by title."""
    groups: dict[str, list[dict[str, str]]] = {}
    for exhibit in report.exhibits:
        groups.setdefault(f"{exhibit['task']}: {exhibit['title']}", []).append(dict(exhibit))
    return groups


def unsaid(c: JsonObject) -> str:
    """The documents without a pair and the reason for no verdict, as one text; a single figure needs no reason."""
    reason = c.get("reason", "") if c.get("n") != 1 else ""
    return "; ".join(filter(None, (left_out(c), reason)))


def _stored_otherwise(report: "Report", name: str) -> str:
    stored = {s["name"]: s.get("stored", "") for s in report.stages}
    return stored_otherwise(stored[name], stored[report.measured[0]])

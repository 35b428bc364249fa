"""Comparisons and the verdicts of a gate, on a terminal and as data."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmq.compare import SideBySide
from llmq.gate import EXIT_CODES, Verdict, overall
from llmq.harmless import cell
from llmq.report.table import ARROWS, MARKS, is_size, left_out, number, stored_otherwise, unsaid
from llmq.statistics import Comparison
from llmq.types import Measurement

COLOURS = {"better": "green", "pass": "green", "worse": "red", "fail": "red", "base-unhealthy": "red"}
LEGEND = (
    "Each figure with its difference from the first column and the 95 % interval of that difference, from pairs of the "
    "same samples. ▲ better, ▼ worse, = the same samples, ? undecided: the interval contains 0, or would if all "
    "comparisons of the table were to hold at once (Holm), or there are too few pairs. sees: the smallest true "
    "difference that 4 of 5 such samples show."
)


def console() -> Console:
    """Where nobody watches there is no width to fit."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def show_comparison(found: SideBySide, out: Console | None = None) -> None:
    """Print one table: a row a figure, a column a result."""
    out = out or console()
    first, *others = found.results
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task", style="dim")
    table.add_column("metric")
    for result in found.results:
        table.add_column(cell(result.name), justify="right")
    table.add_column("sees", justify="right", style="dim")
    compared = {(name, c.task, c.metric): c for name, c in found.comparisons}
    last = ""
    for (task, metric), base in first.figures.items():
        row = [compared.get((o.name, task, metric)) for o in others]
        if not any(row):
            continue
        cells = [_cell(c, o.figures[task, metric]) if c else cell("—") for c, o in zip(row, others, strict=True)]
        scale, unit = _scaled(base)
        seen = [c.detectable for c in row if c and c.detectable]
        sees = f"±{number(max(seen) * scale)}" if seen else ""
        name = " ".join(filter(None, (metric, f"({unit})" if unit else "", ARROWS.get(base.better))))
        table.add_row(cell("" if task == last else task), cell(name), number(base.value * scale), *cells, sees)
        last = task
    out.print(table)
    out.print(LEGEND, style="dim", soft_wrap=True)
    for name, c in found.comparisons:
        if said := unsaid(asdict(c)):
            out.print(cell(f"{name}: {c.task} {c.metric}: {said}"), soft_wrap=True)
    sized = {name for name, c in found.comparisons if is_size(first.figures[c.task, c.metric])}
    for other in others:
        if other.name in sized and (said := stored_otherwise(other.stored, first.stored)):
            out.print(cell(f"{other.name}: {said}"), soft_wrap=True)
    for refusal in found.refusals:
        out.print(cell(f"not compared: {refusal.result}: {refusal.task} {refusal.metric}: {refusal.reason}"))


def _scaled(m: Measurement) -> tuple[float, str]:
    units = {"bytes": (1e-6, "MB"), "parameters": (1e-6, "M")}
    return units.get(m.unit, (1.0, m.unit))


def _cell(c: Comparison, m: Measurement) -> "Text":
    scale = _scaled(m)[0]
    ends = f" [{_signed(c.ci95[0] * scale)}, {_signed(c.ci95[1] * scale)}]" if c.ci95 and c.ci95[0] < c.ci95[1] else ""
    text = f"{number(m.value * scale)}  {_signed(c.difference * scale)}{ends} {MARKS.get(c.verdict, '')}"
    return cell(text, COLOURS.get(c.verdict, ""))


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{'+' if value > 0 else '-'}{number(abs(value))}"


def comparison_as_data(found: SideBySide) -> dict[str, Any]:
    """The table as JSON holds it."""
    first = found.results[0].name
    return {
        "against": first,
        "results": [r.name for r in found.results],
        "stored": {r.name: r.stored for r in found.results if r.stored},
        "measurements": [
            {"result": r.name, **{k: v for k, v in asdict(m).items() if k != "samples"}}
            for r in found.results
            for m in r.measurements
        ],
        "comparisons": [{"result": name, "against": first, **asdict(c)} for name, c in found.comparisons],
        "refused": [asdict(r) for r in found.refusals],
    }


def gate_as_data(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdicts as JSON holds them."""
    outcome = overall(verdicts)
    return {"verdict": outcome, "exit_code": EXIT_CODES[outcome], "rules": [asdict(v) for v in verdicts]}


def show_gate(told: Mapping[str, Any], out: Console | None = None) -> None:
    """Print one line a rule, and the verdict on all; `told` is that of `gate_as_data`."""
    out = out or console()
    for v in told["rules"]:
        verdict = cell(f"{v['verdict']:<15}", COLOURS.get(v["verdict"], "yellow"))
        out.print(verdict.append_text(cell(sentence(v))), soft_wrap=True)
    if len(told["rules"]) > 1:
        out.print(cell(f"{told['verdict']:<15}of all, for stage {told['rules'][0]['stage']}", "bold"), soft_wrap=True)


def sentence(v: Mapping[str, Any]) -> str:
    """A rule, what was found, and what it would take to decide."""
    return "; ".join(_parts(v))


def _parts(v: Mapping[str, Any]) -> Iterator[str]:
    seen = f"{_shown(v['value'], v)}"
    if v["ci95"] and v["ci95"][0] < v["ci95"][1]:
        seen += f" [{_shown(v['ci95'][0], v)}, {_shown(v['ci95'][1], v)}]"
    yield f"{v['rule']}: {v['task']} {v['metric']} {seen}{' of the base' if v['kind'] == 'ratio' else ''}"
    if v["reason"]:
        yield v["reason"]
    if v.get("stored"):
        yield v["stored"]
    if said := left_out(v):
        yield said
    if v["verdict"] == "undecided" and v["ci95"]:
        yield f"{v['n']:,} samples are too few"
        if v["needed"]:
            yield f"about {v['needed']:,} would settle it, if the figure stays where it is"
        else:
            yield "the figure lies on its bound, which no number of samples settles"
        if v["fine"]:
            yield f"to see {'1 pt' if v['points'] and v['kind'] != 'ratio' else '1 %'} takes {v['fine']:,}"


def _shown(value: float, v: Mapping[str, Any]) -> str:
    if v["kind"] == "ratio":
        return f"{value:.4g}x"
    if v["kind"] == "difference":
        return f"{100 * value:+.2f} pt" if v["points"] else f"{value:+.4g}"
    return f"{value / 1e6:,.4g} MB" if v["unit"] == "bytes" else f"{value:.4g}"

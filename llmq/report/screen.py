"""Reports, comparisons and verdicts on a terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llmq.harmless import cell
from llmq.judge.comparisons import Comparisons
from llmq.report.facts import sentence
from llmq.report.rows import (
    COMPARISON_LEGEND,
    LEGEND,
    Row,
    alarms,
    compared_rows,
    comparison_notes,
    notes,
    rows,
)
from llmq.types import JsonObject

if TYPE_CHECKING:
    from rich.text import Text

    from llmq.report import Report

COLOURS = {"better": "green", "pass": "green", "worse": "red", "fail": "red", "base-unhealthy": "red"}


def console(width: int) -> Console:
    """A console as wide as the terminal, or of `width` columns without one, as 80 columns would cut the table."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def show(report: "Report", out: Console | None = None) -> None:
    """Print the table of stages."""
    out = out or console(160)
    out.print(_table(report.columns, list(rows(report)), out.width))
    for line in (LEGEND, *notes(report)):
        _print(out, line, "dim")
    for line in alarms(report):
        _print(out, line, "red")


def show_comparison(compared: Comparisons, out: Console | None = None) -> None:
    """Print the table of results beside the first of them."""
    out = out or console(200)
    out.print(_table([r.name for r in compared.results], list(compared_rows(compared)), out.width, "sees"))
    _print(out, COMPARISON_LEGEND, "dim")
    for line in comparison_notes(compared):
        _print(out, line)


def show_gate(told: JsonObject, out: Console | None = None) -> None:
    """Print one line a rule, and the verdict on all; `told` comes from `gate.as_data`."""
    out = out or console(200)
    for v in told["rules"]:
        verdict = cell(f"{v['verdict']:<15}", COLOURS.get(v["verdict"], "yellow"))
        _print(out, verdict.append_text(cell(sentence(v))))
    if len(told["rules"]) > 1:
        _print(out, cell(f"{told['verdict']:<15}of all, for stage {told['rules'][0]['stage']}", "bold"))


def _print(out: Console, line: "str | Text", style: str = "") -> None:
    """Print a line, wrapped by words on a terminal and whole into a pipe."""
    out.print(cell(line) if isinstance(line, str) else line, style=style, soft_wrap=not out.is_terminal)


NARROW = 110
"""Columns of a terminal below which a task has a line of its own above its figures, so that no name of one is cut."""


def _table(names: Sequence[str], rows: Sequence[Row], width: int, last: str = "") -> Table:
    """A row a metric, a column a name; a task is named once."""
    table, is_narrow = Table(box=None, header_style="bold", pad_edge=False), width < NARROW
    if not is_narrow:
        table.add_column("task", style="dim", overflow="fold")
    longest = max((len(row.metric) for row in rows), default=0)
    table.add_column("metric", overflow="fold", min_width=min(longest, width // 2))  # a gate needs the whole name
    for name in names:
        table.add_column(cell(name), justify="right", overflow="fold")
    if last:
        table.add_column(last, justify="right", style="dim", overflow="fold")
    task = ""
    for row in rows:
        if row.task != task and is_narrow:
            table.add_row(cell(row.task, "dim"))
        shown = [] if is_narrow else [cell("" if row.task == task else row.task)]
        shown += (cell(row.label), *(cell(c, COLOURS.get(c.verdict, "")) for c in row.cells))
        table.add_row(*shown, *([row.sees] if last else ()))
        task = row.task
    return table

"""The report on a terminal."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmq.report import Report
from llmq.report.table import LEGEND, alarms, notes, rows

COLOURS = {"better": "green", "worse": "red"}


def show(report: Report, console: Console | None = None) -> None:
    """Print the table of stages."""
    # Where nobody watches there is no width to fit, and a table cut to 80 columns would serve nobody.
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, style="dim" if name == "task" else "")
    for name in report.measured:
        table.add_column(name, justify="right")
    last = ""
    for row in rows(report):
        cells = (f"[{COLOURS[c.verdict]}]{c}[/]" if c.verdict in COLOURS else str(c) for c in row.cells)
        table.add_row("" if row.task == last else row.task, escape(row.label), *cells)
        last = row.task
    console.print(table)
    console.print(LEGEND, style="dim")
    for line in notes(report):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    for line in alarms(report):
        console.print(line, style="red", markup=False, soft_wrap=True)

"""The report on a terminal."""

import sys

from rich.console import Console
from rich.table import Table

from llmq.harmless import cell
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
        table.add_column(cell(name), justify="right")
    last = ""
    for row in rows(report):
        cells = (cell(c, COLOURS.get(c.verdict, "")) for c in row.cells)
        table.add_row(cell("" if row.task == last else row.task), cell(row.label), *cells)
        last = row.task
    console.print(table)
    console.print(LEGEND, style="dim")
    for line in notes(report):
        console.print(cell(line), style="dim", soft_wrap=True)
    for line in alarms(report):
        console.print(cell(line), style="red", soft_wrap=True)

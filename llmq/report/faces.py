"""The other formats of a report, made from `report.json` in the run folder."""

from pathlib import Path

from llmq.files import write_text
from llmq.report import Report, html, markdown


def write(folder: Path) -> None:
    """Write `report.md` and `report.html` beside `report.json`."""
    report = Report.read(folder)
    write_text(folder / "report.md", markdown.draw(report))
    write_text(folder / "report.html", html.draw(report, folder))

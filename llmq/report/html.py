"""The report as one self-contained page."""

import base64
from dataclasses import asdict
from pathlib import Path

from llmq.harmless import visible_within
from llmq.report import Report, charts
from llmq.report.facts import facts
from llmq.report.markdown import exhibits
from llmq.report.table import LEGEND, TITLE, notes, rows, summary
from llmq.run_paths import picture


def draw(report: Report, folder: Path) -> str:
    """The page, with its pictures inside; those of exhibits are read from the run's `folder`."""
    from jinja2 import Environment, FileSystemLoader

    def inside(file: str) -> str:
        return f"data:image/png;base64,{base64.b64encode(picture(folder, file)).decode()}"

    report = Report(**visible_within(asdict(report)))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.j2").render(
        report=report,
        title=TITLE,
        summary=summary(report),
        rows=list(rows(report)),
        legend=LEGEND,
        notes=notes(report),
        charts=charts.draw(report),
        exhibits=exhibits(report),
        inside=inside,
        facts=facts(report),
    )

"""The report as one self-contained page."""

from pathlib import Path

from llmq.report import Report, charts
from llmq.report.facts import facts
from llmq.report.markdown import exhibits
from llmq.report.table import LEGEND, TITLE, rows, summary


def draw(report: Report) -> str:
    """The page, with its pictures inside."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.j2").render(
        report=report,
        title=TITLE,
        summary=summary(report),
        rows=list(rows(report)),
        legend=LEGEND,
        charts=charts.draw(report),
        exhibits=exhibits(report),
        facts=facts(report),
    )

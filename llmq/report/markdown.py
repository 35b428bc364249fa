"""The report as Markdown."""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from llmq.harmless import alternative, fenced
from llmq.harmless import markdown as inline
from llmq.report.facts import facts
from llmq.report.first import model_of, origin
from llmq.report.rows import LEGEND, exhibits, notes, rows, summary

if TYPE_CHECKING:
    from llmq.report import Report


def table(report: "Report") -> str:
    """The table of stages alone."""
    names = report.columns
    lines = [f"| task | metric | {' | '.join(map(inline, names))} |", f"|---|---|{'---:|' * len(names)}"]
    for row in rows(report):
        lines.append(f"| {inline(row.task)} | {inline(row.label)} | {' | '.join(map(inline, row.cells))} |")
    return "\n".join(lines)


def draw(report: "Report") -> str:
    """The whole report."""
    lead = "\n".join(f"- {inline(line)}" for line in summary(report))
    parts = [
        f"# {inline(model_of(report))}",
        inline(origin(report)),
        lead,
        table(report),
        LEGEND + " ↑ higher is better, ↓ lower is better.",
    ]
    parts += ["\n".join(f"- {inline(line)}" for line in notes(report))] if notes(report) else []
    for title, lines in facts(report, rows(report)).items():
        parts += [f"## {title}", "\n".join(f"- **{inline(name)}**: {inline(text)}" for name, text in lines)]
    if report.exhibits:
        parts.append("## Side by side")
    for title, group in exhibits(report).items():
        parts.append(f"### {inline(title)}")
        if group[0]["input"]:
            parts.append(fenced(group[0]["input"]))
        parts += [f"- **{inline(e['stage'])}**: {_shown(e)}" for e in group]
        if group[0]["reference"]:
            parts.append(f"- **reference**: {inline(group[0]['reference'])}")
    return "\n\n".join(parts) + "\n"


def _shown(exhibit: Mapping[str, str]) -> str:
    picture = f"![{alternative(exhibit['title'])}](<{quote(exhibit['file'])}>)" if exhibit["file"] else ""
    return " ".join(filter(None, (picture, inline(exhibit["output"])))) or "(nothing)"

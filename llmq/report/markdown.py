"""The report as Markdown."""

from collections.abc import Mapping
from urllib.parse import quote

from llmq.harmless import alternative, fenced
from llmq.harmless import markdown as inline
from llmq.report import Report
from llmq.report.facts import facts
from llmq.report.table import LEGEND, TITLE, notes, rows, summary


def table(report: Report) -> str:
    """The table of stages alone."""
    names = report.measured
    lines = [f"| task | metric | {' | '.join(map(inline, names))} |", f"|---|---|{'---:|' * len(names)}"]
    for row in rows(report):
        lines.append(f"| {inline(row.task)} | {inline(row.label)} | {' | '.join(map(inline, row.cells))} |")
    return "\n".join(lines)


def draw(report: Report) -> str:
    """The whole report."""
    lead = "\n".join(f"- {inline(line)}" for line in summary(report))
    parts = [f"# {TITLE}", lead, table(report), LEGEND + " ↑ higher is better, ↓ lower is better."]
    parts += ["\n".join(f"- {inline(line)}" for line in notes(report))] if notes(report) else []
    for title, lines in facts(report).items():
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


def exhibits(report: Report) -> dict[str, list[dict[str, str]]]:
    """What the stages made of the same input, by title."""
    groups: dict[str, list[dict[str, str]]] = {}
    for exhibit in report.exhibits:
        groups.setdefault(f"{exhibit['task']}: {exhibit['title']}", []).append(dict(exhibit))
    return groups

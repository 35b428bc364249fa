"""The runs in a folder: one entry a run, read from the reports."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import UserError
from llmq.guarded.files import library
from llmq.report import Report
from llmq.report.rows import summary
from llmq.runs.paths import check
from llmq.source import read


@dataclass(frozen=True)
class Shelved:
    """A run at a glance; a run that has not ended has no `gate`, and a `headline` that says so."""

    folder: str
    model: str
    steps: tuple[str, ...]
    ended: str
    """The local time at which the report was written, to the minute; empty for a run that has not ended."""
    done: int
    """The stages that are whole, of `len(steps) + 1`."""
    gate: str
    headline: str
    evaluated: bool = False
    """True for an evaluation of what was there: its stages are those of the target, and it has no steps."""

    @property
    def progress(self) -> str:
        """`2 of 3 stages`; of an evaluation `2 stages evaluated`."""
        if self.evaluated:
            return f"{self.done} stage{'s' * (self.done != 1)} evaluated"
        return f"{self.done} of {len(self.steps) + 1} stages"


def runs(folder: Path) -> Iterator[Shelved]:
    """The runs in a folder, the latest first. A damaged one is listed with its fault as headline."""
    made = [f for f in folder.iterdir() if (f / "recipe.yaml").is_file() or (f / "report.json").is_file()]
    for run in sorted(made, key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            yield _shelved(run)
        except UserError as error:
            yield Shelved(str(run), "", (), "", 0, "", f"damaged: {error}")


def _shelved(run: Path) -> Shelved:
    check(run)
    file = run / "report.json"
    with library(run, "run"):
        report = Report.read(run) if file.is_file() else None
        asked = report.recipe if report else read(run / "recipe.yaml").data
        model = asked.get("model") or asked.get("target", "")
        word, settings = next(iter(model.items())) if isinstance(model, dict) else (str(model), None)
        steps = tuple(entry if isinstance(entry, str) else next(iter(entry)) for entry in asked.get("steps", ()))
        done = len(report.stages) if report else len(list(run.glob("[0-9]*-*/artifact.json")))
        return Shelved(
            str(run),
            str((settings or {}).get("weights") or word),
            steps,
            f"{datetime.datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}" if report else "",
            done,
            str(report.gate["verdict"]) if report and report.gate else "",
            "; ".join(summary(report)[-1:]) if report else f"not ended: {done} of {len(steps) + 1} stages",
            "target" in asked,
        )

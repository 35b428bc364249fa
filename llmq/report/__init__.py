"""The `Report` sets every stage beside the untouched base. `report.json` is the truth; its faces are drawn from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.artifact import Artifact
from llmq.files import stored_as, write_json, write_text
from llmq.guarded import json_files
from llmq.protocols import refused
from llmq.statistics import compare, corrected
from llmq.types import Exhibit, Measurement

SCHEMA_VERSION = 2
"""1: no figure said that it is exact; a standard error of 0 stood for that, see `artifact.measurement_from`."""


@dataclass(frozen=True)
class Failure:
    """A task that failed at a stage: what it was asked (`score`, `against`, `clocks`), and the error in one line."""

    task: str
    asked: str
    error: str


@dataclass(frozen=True)
class Stage:
    """A stage of a run and what was found out about it."""

    name: str
    artifact: Artifact
    measurements: tuple[Measurement, ...] = ()
    exhibits: tuple[Exhibit, ...] = ()
    reused: tuple[str, ...] = ()
    """The tasks whose answers were kept from an earlier run."""
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that a run found out, as plain data."""

    schema_version: int
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    stages: Sequence[Mapping[str, Any]]
    measurements: Sequence[Mapping[str, Any]]
    comparisons: Sequence[Mapping[str, Any]]
    exhibits: Sequence[Mapping[str, Any]]
    gate: Mapping[str, Any] | None = None
    """The verdicts on the rules of the recipe, where it has some."""
    failures: Sequence[Mapping[str, str]] = ()
    """The tasks that failed, with their stages; what they answered before that stands among the measurements."""
    refused: Sequence[Mapping[str, str]] = ()
    """The figures that both a stage and the base have and that are not compared, with the reason."""

    @classmethod
    def of(
        cls, recipe: Mapping[str, Any], environment: Mapping[str, Any], stages: Sequence[Stage], baseline: str
    ) -> "Report":
        """The report of stages, each compared with the one called `baseline`."""
        base = next(s for s in stages if s.name == baseline)
        compared, not_compared = _comparisons([s for s in stages if s is not base], base)
        return cls(
            SCHEMA_VERSION,
            json.loads(json.dumps(recipe, default=str)),
            environment,
            [_stage(s) for s in stages],
            [{"stage": s.name, **_without_samples(m)} for s in stages for m in s.measurements],
            compared,
            [{"stage": s.name, **_without_picture(e)} for s in stages for e in s.exhibits],
            failures=[{"stage": s.name, **asdict(f)} for s in stages for f in s.failures],
            refused=not_compared,
        )

    @property
    def measured(self) -> list[str]:
        """The names of the stages that were measured, in their order."""
        asked = {m["stage"] for m in self.measurements}
        return [s["name"] for s in self.stages if s["name"] in asked]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of a run folder."""
        return cls(**json_files.read_object(folder / "report.json"))

    def write(self, out: Path) -> None:
        """`report.json`, and the faces drawn from it."""
        from llmq.report import html, markdown

        write_json(out / "report.json", asdict(self))
        report = Report.read(out)
        write_text(out / "report.md", markdown.draw(report))
        write_text(out / "report.html", html.draw(report, out))


def _stage(stage: Stage) -> dict[str, Any]:
    artifact = stage.artifact
    step = artifact.history[-1] if artifact.history else None
    notes = dict(artifact.notes)
    return {
        "name": stage.name,
        "step": step,
        "folder": stage.name,
        "seconds": notes.pop("seconds", 0.0),
        "notes": notes,
        "reused": list(stage.reused),
        "stored": stored_as(artifact.weight_files()),
    }


def _without_picture(exhibit: Exhibit) -> dict[str, Any]:
    return {k: v for k, v in asdict(exhibit).items() if k != "picture"}


def _without_samples(measurement: Measurement) -> dict[str, Any]:
    return {k: v for k, v in asdict(measurement).items() if k not in ("samples", "chance")}


def _comparisons(stages: Sequence[Stage], base: Stage) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The figures of each stage beside the base's, and those that are not compared."""
    known = {(m.task, m.metric): m for m in base.measurements}
    both = [(s, m, known[m.task, m.metric]) for s in stages for m in s.measurements if (m.task, m.metric) in known]
    reasons = [refused(m, b) for _, m, b in both]
    alike = [pair for pair, reason in zip(both, reasons, strict=True) if not reason]
    found = corrected([compare(m, b) for _, m, b in alike])
    compared = [{"stage": s.name, "against": base.name, **asdict(c)} for (s, _, _), c in zip(alike, found, strict=True)]
    return compared, [
        {"stage": s.name, "task": m.task, "metric": m.metric, "reason": reason}
        for (s, m, _), reason in zip(both, reasons, strict=True)
        if reason
    ]

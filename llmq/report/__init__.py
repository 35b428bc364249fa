"""The `Report` sets every stage beside the untouched base. All other formats are made from `report.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmq.artifact import Stage
from llmq.files import write_json
from llmq.guarded.files import read_json_object
from llmq.judge.protocols import refused
from llmq.runs.paths import check_schema
from llmq.statistics.compare import compare, corrected
from llmq.types import SCHEMA_VERSION, Exhibit, JsonObject, Measurement

BICUBIC = "bicubic"
PREFIX = f"{BICUBIC}_"
REFERENCES = (PREFIX, "true_")
"""The beginnings of names of figures that no stage has a part in: of bicubic interpolation, and of the truth."""


@dataclass(frozen=True)
class Report:
    """Everything that a run found out, as plain data."""

    schema_version: int
    recipe: JsonObject
    environment: JsonObject
    stages: Sequence[JsonObject]
    measurements: Sequence[JsonObject]
    comparisons: Sequence[JsonObject]
    exhibits: Sequence[JsonObject]
    gate: JsonObject | None = None
    """The verdicts on the rules of the recipe, where it has some."""
    failures: Sequence[Mapping[str, str]] = ()
    """The tasks that failed, with their stages; their answers before the failure are among the measurements."""
    refused: Sequence[Mapping[str, str]] = ()
    """The figures that both a stage and the base have and that are not compared, with the reason."""
    foretold: JsonObject | None = None
    """The plan that was made before the run (`planning.Plan`); None without one, and in older reports."""
    seconds: float | None = None
    """The wall time of the run, from the base on; None for one that was resumed, and in older reports."""

    @classmethod
    def of(cls, recipe: JsonObject, environment: JsonObject, stages: Sequence[Stage], baseline: str) -> "Report":
        """The report of stages, each compared with the one called `baseline`."""
        base = next(s for s in stages if s.name == baseline)
        compared, not_compared = _comparisons([*(s for s in stages if s is not base), *_bicubic(base)], base)
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

    @property
    def columns(self) -> list[str]:
        """The measured stages; and bicubic interpolation, where it was set beside them."""
        return self.measured + [BICUBIC] * any(c["stage"] == BICUBIC for c in self.comparisons)

    def told_by_step(self, m: JsonObject) -> bool:
        """True for a figure that the step of the stage took itself, as `adapt.merge` does of what it folded."""
        return any(stage["name"] == m["stage"] and stage["step"] == m["task"] for stage in self.stages)

    @property
    def lacks_base(self) -> bool:
        """True where a task failed at the base, so that figures of other stages have nothing beside them."""
        asked = [stage["name"] for stage in self.stages if stage["name"] in self.measured or stage.get("asked")]
        return any(failure["stage"] in asked[:1] for failure in self.failures)

    @property
    def folder(self) -> Path:
        """The folder of the run, as it was when the run ended."""
        return Path(self.environment["run"])

    def table(self) -> str:
        """The stages side by side, as the terminal shows them."""
        from io import StringIO

        from rich.console import Console

        from llmq.report import screen

        text = StringIO()
        screen.show(self, Console(file=text, width=160, highlight=False))
        return text.getvalue()

    def _repr_html_(self) -> str:
        """The page of the report, for notebooks."""
        from llmq.report import html

        return html.framed(self)

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of a run folder. Raises `KeyError` or `TypeError` for a figure that is none, or of no stage."""
        file = folder / "report.json"
        told = read_json_object(file)
        check_schema(told, file)
        report = cls(**told)
        names = {stage["name"] for stage in report.stages}
        for m in report.measurements:
            Measurement.of({key: value for key, value in m.items() if key != "stage"})
            if m["stage"] not in names:
                raise KeyError(m["stage"])
        return report

    def save(self, folder: Path) -> None:
        """Write `report.json`."""
        write_json(folder / "report.json", asdict(self))


def _stage(stage: Stage) -> JsonObject:
    artifact = stage.artifact
    step = artifact.history[-1] if artifact.history else None
    notes = dict(artifact.notes)
    return {
        "name": stage.name,
        "step": step,
        "folder": stage.name,
        "seconds": notes.pop("seconds", 0.0),
        "notes": notes,
        "asked": dict(stage.asked),
        "reused": list(stage.reused),
        "stored": artifact.stored,
    }


def _without_picture(exhibit: Exhibit) -> JsonObject:
    return {k: v for k, v in asdict(exhibit).items() if k != "picture"}


def _without_samples(measurement: Measurement) -> JsonObject:
    return {k: v for k, v in asdict(measurement).items() if k not in ("samples", "chance")}


def _bicubic(base: Stage) -> Iterator[Stage]:
    """Bicubic interpolation as if it were a stage, of the figures that a task takes of both."""
    taken = {(m.task, m.metric): m for m in base.measurements}
    figures = tuple(
        replace(m, metric=own.metric, convention=own.convention)
        for m in base.measurements
        if m.metric.startswith(PREFIX) and (own := taken.get((m.task, m.metric.removeprefix(PREFIX))))
    )
    if figures:
        yield replace(base, name=BICUBIC, measurements=figures)


def _comparisons(stages: Sequence[Stage], base: Stage) -> tuple[list[JsonObject], list[dict[str, str]]]:
    """The figures of each stage beside the base's, and those that are not compared."""
    known = {(m.task, m.metric): m for m in base.measurements}
    both = [
        (s, m, known[m.task, m.metric])
        for s in stages
        for m in s.measurements
        if (m.task, m.metric) in known and not m.metric.startswith(REFERENCES)
    ]
    reasons = [refused(m, b) for _, m, b in both]
    alike = [pair for pair, reason in zip(both, reasons, strict=True) if not reason]
    found = corrected([compare(m, b) for _, m, b in alike])
    compared = [{"stage": s.name, "against": base.name, **asdict(c)} for (s, _, _), c in zip(alike, found, strict=True)]
    return compared, [
        {"stage": s.name, "task": m.task, "metric": m.metric, "reason": reason}
        for (s, m, _), reason in zip(both, reasons, strict=True)
        if reason
    ]

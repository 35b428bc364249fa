"""Putting tasks to stages: answers are kept in the stage's folder; a task that fails costs no other its answer."""

import re
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmq import measure
from llmq.answers import Interview
from llmq.artifact import Artifact, measurement_from
from llmq.errors import one_line
from llmq.files import to_json, write_json, write_text
from llmq.guarded import json_files
from llmq.guarded.files import library
from llmq.reading import named
from llmq.report import SCHEMA_VERSION, Failure, Stage
from llmq.run_paths import within
from llmq.terminal import log, say
from llmq.types import Answer, Attachment, Clock, Exhibit, Loaded, Measurement, Task


def question(stage: Stage, tasks: Sequence[Task], out: Path, device: str, base: Artifact, cache: bool = True) -> Stage:
    """Put every task to one stage, open alone, then beside `base`; kept in its folder, not asked again on resuming.

    With `cache`, what was answered before to the very same question about the very same model is used again.
    """
    kept = out / stage.name / "measurements.json"
    if kept.exists():
        _with_answers(stage, out, kept)
    before: Mapping[str, Any] = json_files.read_object(kept) if kept.exists() else {}
    asked = [
        (method, name, task)
        for method in ("score", "against")
        for name, task in named(tasks).items()
        if method == "score" or (stage.artifact != base and answer_by("against", [task]))
    ]
    if before:  # what has failed is asked again, and nothing else
        failed = {(f["asked"], f["task"]) for f in before.get("failures", ())}
        asked = [question for question in asked if question[:2] in failed]
    if asked or not before:
        answers: list[Answer] = [] if before else list(stage.artifact.measurements)
        with Interview(stage.artifact, base, device, cache) as interview:
            found = [ask(interview, *question, names_before(tasks), stage.name, answers) for question in asked]
        failures = [failure for failure in found if failure]
        keep(answers, failures, interview.reused, before, out, stage.name)
    return _with_answers(stage, out, kept)


def _with_answers(stage: Stage, out: Path, kept: Path) -> Stage:
    """The stage with what stands in its file of answers. Raises `UserError` for a file that is damaged."""
    data = json_files.read_object(kept)
    with library(kept, "file of answers"):
        return replace(
            stage,
            measurements=tuple(measurement_from(m) for m in data["measurements"]),
            exhibits=tuple(_exhibit(e, out, kept) for e in data["exhibits"]),
            reused=tuple(data.get("reused", ())),
            failures=tuple(Failure(**f) for f in data.get("failures", ())),
        )


def _exhibit(entry: Mapping[str, Any], out: Path, kept: Path) -> Exhibit:
    """An exhibit as it was kept. Raises `UserError` for a picture that lies elsewhere than in the run."""
    exhibit = Exhibit(**entry)
    if exhibit.file:
        within(out, exhibit.file, kept)
    return exhibit


def keep(
    answers: Sequence[Answer],
    failures: Sequence[Failure],
    reused: Sequence[str],
    before: Mapping[str, Any],
    out: Path,
    stage: str,
) -> None:
    """Write answers into the folder of their stage; each takes the place of what was answered to the same `before`."""
    folder = out / stage
    folder.mkdir(exist_ok=True)
    measurements = [a for a in answers if isinstance(a, Measurement)]
    for attachment in (a for a in answers if isinstance(a, Attachment)):
        file = within(folder, attachment.file, attachment.task)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, attachment.text)
    write_samples(measurements, folder / "samples")
    figures = {(m["task"], m["metric"]): m for m in (*before.get("measurements", ()), *map(asdict, measurements))}
    shown = [keep_picture(a, out, stage) for a in answers if isinstance(a, Exhibit)]
    exhibits = {(e["task"], e["title"], e["input"]): e for e in (*before.get("exhibits", ()), *shown)}
    whole = {
        "schema_version": SCHEMA_VERSION,
        "measurements": list(figures.values()),
        "exhibits": list(exhibits.values()),
        "reused": list(dict.fromkeys((*before.get("reused", ()), *reused))),
        "failures": [asdict(f) for f in failures],
    }
    write_json(folder / "measurements.json", whole)


def keep_picture(exhibit: Exhibit, out: Path, stage: str) -> dict[str, Any]:
    """The exhibit as JSON holds it, its picture a file beside the stage's measurements."""
    data = {k: v for k, v in asdict(exhibit).items() if k != "picture"}
    if exhibit.picture:
        name = re.sub(r"[^\w.-]+", "-", f"{exhibit.task}-{exhibit.title}")
        data["file"] = f"{stage}/pictures/{name}.png"
        file = out / data["file"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(exhibit.picture)
    return data


def filed(task: str, name: str, asked: Task) -> str:
    """`task` as its measurement says, under the name that tells two tasks of one word apart."""
    return name if task == asked.name else task


def names_before(tasks: Sequence[Task]) -> dict[str, set[str]]:
    """For each task by its name, the names that figures of the tasks before it can be filed under."""
    taken: dict[str, set[str]] = {}
    names: set[str] = set()
    for name, task in named(tasks).items():
        taken[name] = set(names)
        names |= {filed(figure, name, task) for figure in task.figures_of}
    return taken


def ask(
    interview: Interview,
    method: str,
    name: str,
    task: Task,
    taken: Mapping[str, set[str]],
    stage: str,
    answers: list[Answer],
) -> Failure | None:
    """Add what a task answers to `answers`, filed under its name, or under both where the name is taken.

    Returns the failure of a task that fails; what it answered before is kept.
    """
    began = time.perf_counter()
    try:
        for answer in getattr(interview, method)(name, task):
            its = filed(answer.task, name, task)
            answers.append(replace(answer, task=f"{its} ({name})" if its in taken[name] else its))
    except Exception as error:  # of any kind: it must not cost the other tasks' answers, and the run ends with code 4
        if error is interview.unopened:
            raise
        return failure(name, method, stage, error)
    say(f"  {stage}  {name:<14} {time.perf_counter() - began:6.1f} s")
    return None


def failure(name: str, method: str, stage: str, error: BaseException) -> Failure:
    """Say that a task failed; where in the code stands in the log of the run."""
    say(f"  {stage}  {name:<14} FAILED: {one_line(error)}")
    log("".join(traceback.format_exception(error)))
    return Failure(name, method, one_line(error))


def write_samples(measurements: Sequence[Measurement], folder: Path) -> None:
    """The per-sample scores as `samples/<task>.<metric>.jsonl`."""
    folder.mkdir(exist_ok=True)
    for m in measurements:
        if m.samples:
            weights = m.samples.weights or (1.0,) * len(m.samples.values)
            rows = (
                to_json({"sample": i, "score": v, "weight": w})
                for i, (v, w) in enumerate(zip(m.samples.values, weights, strict=True))
            )
            name = re.sub(r"[^\w.-]+", "_", f"{m.task}.{m.metric}")
            write_text(folder / f"{name}.jsonl", "\n".join(rows) + "\n")


def answer_by(method: str, tasks: Iterable[Task]) -> bool:
    """Whether one of the tasks overrides `score`, `against` or `clocks`."""
    return any(getattr(type(task), method) is not getattr(Task, method) for task in tasks)


def take_times(stages: Mapping[str, Stage], tasks: Sequence[Task], out: Path, device: str) -> dict[str, Stage]:
    """Time all stages in turn, all of them open at once; the stages with what the clocks say added, and kept."""
    if not answer_by("clocks", tasks):
        return dict(stages)
    began = time.perf_counter()
    timed = dict(stages)
    taken: dict[str, list[Measurement]] = {name: [] for name in stages}
    with ExitStack() as open_stages:
        loaded = {name: open_stages.enter_context(s.artifact.open(device)) for name, s in stages.items()}
        for name, task in named(tasks).items():
            found, failures = time_task(name, task, loaded, device)
            for stage, measurements in found.items():
                taken[stage] += measurements
            for stage, failed in failures.items():
                timed[stage] = replace(timed[stage], failures=(*timed[stage].failures, failed))
    for stage, measurements in taken.items():
        write_samples(measurements, out / stage / "samples")
        told = {"schema_version": SCHEMA_VERSION, "measurements": [asdict(m) for m in measurements]}
        write_json(out / stage / "clocks.json", told)
    say(f"  all stages in turn: clocks {time.perf_counter() - began:.1f} s")
    return {n: replace(timed[n], measurements=(*timed[n].measurements, *taken[n])) for n in stages}


def time_task(
    name: str, task: Task, loaded: Mapping[str, Loaded], device: str
) -> tuple[dict[str, list[Measurement]], dict[str, Failure]]:
    """The times of one task on all stages in turn, without those on which it fails; and its failures by stage."""
    clocks: dict[str, list[Clock]] = {}
    failures: dict[str, Failure] = {}
    for stage, model in loaded.items():
        try:
            clocks[stage] = [replace(clock, task=filed(clock.task, name, task)) for clock in task.clocks(model)]
        except Exception as error:  # noqa: BLE001 - of any kind, as in `ask`
            failures[stage] = failure(name, "clocks", stage, error)
    while clocks:
        try:
            return measure.interleave(clocks, device), failures
        except measure.ClockFailed as failed:
            del clocks[failed.stage]
            failures[failed.stage] = failure(name, "clocks", failed.stage, failed.__cause__ or failed)
    return {}, failures

"""Stages evaluated by tasks. The folder of a stage keeps the answers; a task that fails costs no other answer."""

import re
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from llmq import environment, measure, together
from llmq.answers import AnswerCache
from llmq.artifact import MACHINE, Artifact, Failure, Stage
from llmq.errors import is_of_machine, one_line
from llmq.files import sha256_text, to_json, write_json, write_text
from llmq.guarded.files import library, read_json_object
from llmq.reading import by_name
from llmq.runs.paths import within
from llmq.terminal import log, say
from llmq.types import SCHEMA_VERSION, Answer, Attachment, Clock, Exhibit, JsonObject, Loaded, Measurement, Task

Question = tuple[str, str, Task]
"""A method of `Task` (`score` or `against`), the task's name in the run, and the task."""
Taken = dict[str, list[Measurement]]
"""The times of each stage."""
Failed = Mapping[str, list[Failure]]
"""The failures of each stage."""


def question(stage: Stage, tasks: Sequence[Task], out: Path, device: str, base: Artifact, cache: bool = True) -> Stage:
    """Put every task to one stage, open alone, then beside `base`; a resumed run asks again only what failed.

    With `cache`, an earlier answer to the very same question about the very same model is used again.
    """
    kept = out / stage.name / "measurements.json"
    before: JsonObject = {}
    if kept.exists():
        _with_answers(stage, out, kept)  # damaged answers are refused before a model is opened
        before = read_json_object(kept)
    asked = list(_unanswered(stage, tasks, base, before))
    if asked or not before:
        answers: list[Answer] = [] if before else list(stage.artifact.measurements)
        taken = _names_before(tasks)
        began = time.perf_counter()
        with (
            environment.set_aside(),
            environment.without_holes(),
            environment.large_blocks_apart(),
            measure.peak_memory(device) as peak,
            AnswerCache(stage.artifact, base, device, cache) as known,
        ):
            tried = [_timed_answers(known, *one, taken, stage.name, answers) for one in asked]
        spent = {
            "seconds": round(time.perf_counter() - began, 3),
            "peak_memory": max(0, peak.bytes - measure.memory_now(device)),
            "processes": together.count(),
        }
        _keep(answers, [failure for failure in tried if failure], known.reused, before, out / stage.name, spent)
    return _with_answers(stage, out, kept)


def _unanswered(stage: Stage, tasks: Sequence[Task], base: Artifact, before: JsonObject) -> Iterator[Question]:
    """The questions to a stage: all of them, or those that failed where answers of `before` are kept."""
    failed = {(f["asked"], f["task"]) for f in before.get("failures", ())}
    for method in ("score", "against"):
        for name, task in by_name(tasks).items():
            applies = method == "score" or (stage.artifact != base and overrides("against", [task]))
            if applies and (not before or (method, name) in failed):
                yield method, name, task


def _with_answers(stage: Stage, out: Path, kept: Path) -> Stage:
    """The stage with the answers in its file. Raises `UserError` for a damaged file, or a picture outside the run."""
    data = read_json_object(kept)
    with library(kept, "file of answers"):
        exhibits = tuple(Exhibit(**e) for e in data["exhibits"])
        for exhibit in exhibits:
            if exhibit.file:
                within(out, exhibit.file, kept)
        return replace(
            stage,
            measurements=tuple(Measurement.of(m) for m in data["measurements"]),
            exhibits=exhibits,
            reused=tuple(data.get("reused", ())),
            failures=tuple(Failure(**f) for f in data.get("failures", ())),
            asked=_of_machine(kept.parent).get("asked", {}),
        )


def _keep(
    answers: Sequence[Answer],
    failures: Sequence[Failure],
    reused: Sequence[str],
    before: JsonObject,
    folder: Path,
    spent: Mapping[str, float],
) -> None:
    """Write answers into the folder of their stage; each replaces an answer of `before` to the same question."""
    folder.mkdir(exist_ok=True)
    for attachment in (a for a in answers if isinstance(a, Attachment)):
        file = within(folder, attachment.file, attachment.task)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, attachment.text)
    measurements = [a for a in answers if isinstance(a, Measurement)]
    write_samples(measurements, folder / "samples")
    figures = {(m["task"], m["metric"]): m for m in (*before.get("measurements", ()), *map(asdict, measurements))}
    files = _file_names((f"{a.task}-{a.title}" for a in answers if isinstance(a, Exhibit)), "-")
    shown = [_keep_picture(a, folder, files) for a in answers if isinstance(a, Exhibit)]
    exhibits = {(e["task"], e["title"], e["input"]): e for e in (*before.get("exhibits", ()), *shown)}
    whole = {
        "schema_version": SCHEMA_VERSION,
        "measurements": list(figures.values()),
        "exhibits": list(exhibits.values()),
        "reused": list(dict.fromkeys((*before.get("reused", ()), *reused))),
        "failures": [asdict(f) for f in failures],
    }
    write_json(folder / "measurements.json", whole)
    told = _of_machine(folder)
    # Tasks that failed and are asked again say little of the time of all.
    write_json(folder / MACHINE, {**told, "asked": told.get("asked", spent)})


def _of_machine(folder: Path) -> JsonObject:
    """What the machine told of a stage: times and peaks lie apart from what the same recipe gives everywhere."""
    file = folder / MACHINE
    return read_json_object(file) if file.exists() else {}


def _keep_picture(exhibit: Exhibit, folder: Path, files: Mapping[str, str]) -> JsonObject:
    """The exhibit as JSON holds it; the picture becomes a file in the folder of the stage."""
    data = {k: v for k, v in asdict(exhibit).items() if k != "picture"}
    if exhibit.picture:
        name = files[f"{exhibit.task}-{exhibit.title}"]
        file = folder / "pictures" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(exhibit.picture)
        data["file"] = f"{folder.name}/pictures/{name}.png"
    return data


def unique_task(task: str, name: str, asked: Task) -> str:
    """The task that a measurement names, under the name that tells two tasks of one word apart."""
    return name if task == asked.name else task


def _names_before(tasks: Sequence[Task]) -> dict[str, set[str]]:
    """For each task by name, the names that figures of earlier tasks can have."""
    taken: dict[str, set[str]] = {}
    names: set[str] = set()
    for name, task in by_name(tasks).items():
        taken[name] = set(names)
        names |= {unique_task(figure, name, task) for figure in task.figures_of}
    return taken


def _timed_answers(
    known: AnswerCache,
    method: str,
    name: str,
    task: Task,
    taken: Mapping[str, set[str]],
    stage: str,
    answers: list[Answer],
) -> Failure | None:
    """Add the answers of a task to `answers` and say how long they took.

    Returns the failure of a task that fails; its answers before the failure are kept.
    """
    began = time.perf_counter()
    try:
        for answer in getattr(known, method)(name, task):
            unique = unique_task(answer.task, name, task)
            answers.append(replace(answer, task=f"{unique} ({name})" if unique in taken[name] else unique))
    except Exception as error:  # of any kind: it must not cost the other tasks' answers, and the run ends with code 4
        if error is known.unopened:
            raise
        return _failure(name, method, stage, error)
    environment.trim(known.device)  # what one task freed does not fit the blocks of the next one
    say(f"  {stage}  {name:<14} {time.perf_counter() - began:6.1f} s")
    return None


def _failure(name: str, method: str, stage: str, error: BaseException) -> Failure:
    say(f"  {stage}  {name:<14} FAILED: {one_line(error)}")
    log("".join(traceback.format_exception(error)))
    return Failure(name, method, one_line(error))


def write_samples(measurements: Sequence[Measurement], folder: Path) -> None:
    """Write the scores by sample as `samples/<task>.<metric>.jsonl`."""
    folder.mkdir(exist_ok=True)
    files = _file_names((f"{m.task}.{m.metric}" for m in measurements), "_")
    for m in measurements:
        if m.samples:
            weights = m.samples.weights or (1.0,) * len(m.samples.values)
            scored = enumerate(zip(m.samples.values, weights, strict=True))
            rows = (to_json({"sample": i, "score": value, "weight": weight}) for i, (value, weight) in scored)
            write_text(folder / f"{files[f'{m.task}.{m.metric}']}.jsonl", "\n".join(rows) + "\n")


def _file_names(names: Iterable[str], instead: str) -> dict[str, str]:
    """A file name for each name; those that differ only in what no file name has bear a digest as well."""
    plain = {name: re.sub(r"[^\w.-]+", instead, name) for name in names}
    alike = Counter(file.casefold() for file in plain.values())
    return {n: f if alike[f.casefold()] == 1 else f"{f}{instead}{sha256_text(n)[:8]}" for n, f in plain.items()}


def overrides(method: str, tasks: Iterable[Task]) -> bool:
    """True if one of the tasks overrides `method`: `score`, `against` or `clocks`."""
    return any(getattr(type(task), method) is not getattr(Task, method) for task in tasks)


def take_times(stages: Mapping[str, Stage], tasks: Sequence[Task], out: Path, device: str) -> dict[str, Stage]:
    """Time all stages in turn; the figures join the stages, and `clocks.json` keeps them.

    All are open at once where memory has room for that, else one at a time.
    """
    if not overrides("clocks", tasks):
        return dict(stages)
    began = time.perf_counter()
    ways = [_time_together] if fit_at_once(list(stages.values()), device) else []
    for way in (*ways, _time_alone):
        failed: dict[str, list[Failure]] = {name: [] for name in stages}
        taken: dict[str, list[Measurement]] = {name: [] for name in stages}
        if way(stages, tasks, device, taken, failed):
            break
    for stage, measurements in taken.items():
        write_samples(measurements, out / stage / "samples")
        clocks = {"schema_version": SCHEMA_VERSION, "measurements": [asdict(m) for m in measurements]}
        write_json(out / stage / "clocks.json", clocks)
    say(f"  all stages in turn: clocks {time.perf_counter() - began:.1f} s")
    return {
        name: replace(s, measurements=(*s.measurements, *taken[name]), failures=(*s.failures, *failed[name]))
        for name, s in stages.items()
    }


def fit_at_once(stages: Sequence[Stage], device: str) -> bool:
    """True if the free memory has room for all stages, each at the peak that it had when it was asked alone.

    The peak of a stage is what the speed task measured; without that task the stage takes its bytes on disk.
    """

    def peak(stage: Stage) -> float:
        known = [m.value for m in stage.measurements if m.metric == "peak_memory"]
        return max(known, default=float(stage.artifact.bytes_on_disk))

    return sum(map(peak, stages)) <= environment.free_memory(device)


def _time_together(
    stages: Mapping[str, Stage], tasks: Sequence[Task], device: str, taken: Taken, failed: Failed
) -> bool:
    """Time all stages, open at once; False where memory has no room for them after all."""
    with ExitStack() as open_stages:
        try:
            loaded = {name: open_stages.enter_context(s.artifact.open(device)) for name, s in stages.items()}
        except Exception as error:
            if not is_of_machine(error):
                raise
            return False
        for name, task in by_name(tasks).items():
            for stage, measurements in time_task(name, task, loaded, device, failed).items():
                taken[stage] += measurements
    return True


def _time_alone(stages: Mapping[str, Stage], tasks: Sequence[Task], device: str, taken: Taken, failed: Failed) -> bool:
    """Time all stages, one open at a time; a stage that fails is added to `failed`."""
    say("  memory has no room for all stages at once; each is opened in turn")
    for name, task in by_name(tasks).items():
        if overrides("clocks", [task]):
            for stage, measurements in _time_task_alone(name, task, dict(stages), device, failed).items():
                taken[stage] += measurements
    return True


def _time_task_alone(
    name: str, task: Task, left: dict[str, Stage], device: str, failed: Failed
) -> dict[str, list[Measurement]]:
    @contextmanager
    def opened(stage: Stage) -> Iterator[list[Clock]]:
        with stage.artifact.open(device) as loaded:
            yield _clocks(name, task, loaded)

    while left:
        try:
            return measure.in_visits({n: partial(opened, s) for n, s in left.items()}, device)
        except measure.ClockFailed as error:
            del left[error.stage]
            failed[error.stage].append(_failure(name, "clocks", error.stage, error.__cause__ or error))
            error.__traceback__ = error.__cause__ = None  # whose frames hold the open stage
    return {}


def _clocks(name: str, task: Task, loaded: Loaded) -> list[Clock]:
    return [replace(clock, task=unique_task(clock.task, name, task)) for clock in task.clocks(loaded)]


def time_task(
    name: str, task: Task, loaded: Mapping[str, Loaded], device: str, failed: Mapping[str, list[Failure]]
) -> dict[str, list[Measurement]]:
    """The times of one task on all stages in turn; stages on which the task fails are added to `failed`."""
    clocks: dict[str, list[Clock]] = {}
    for stage, model in loaded.items():
        try:
            clocks[stage] = _clocks(name, task, model)
        except Exception as error:  # noqa: BLE001 - of any kind, as in `_timed_answers`
            failed[stage].append(_failure(name, "clocks", stage, error))
    while clocks:
        try:
            return measure.interleave(clocks, device)
        except measure.ClockFailed as error:
            del clocks[error.stage]
            failed[error.stage].append(_failure(name, "clocks", error.stage, error.__cause__ or error))
    return {}

"""The whole job, in the order it happens."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from llmq import environment, gate, measure, processes, reading, replay
from llmq.answers import Interview
from llmq.errors import UserError
from llmq.files import make_whole, sha256_files, to_json, write_json, write_text
from llmq.recipe import Recipe, check_order
from llmq.report import SCHEMA_VERSION, Report, Stage
from llmq.report.verdicts import gate_as_data
from llmq.rules import Rule
from llmq.source import Source
from llmq.terminal import logged_to, say
from llmq.types import (
    Answer,
    Artifact,
    Attachment,
    Clock,
    Context,
    Exhibit,
    Loaded,
    Measurement,
    Plugin,
    Step,
    Task,
    measurement_from,
)


def run(recipe: Recipe, out: Path, resume: bool = False, cache: bool = True) -> Report | None:
    """Bring the base, apply the steps, question every stage, report. A whole stage is never lost.

    Where a launcher started several processes they share the training; only the first writes and returns a report.
    """
    first = processes.is_first()
    if first:
        check_folder(recipe, out, resume)
    context = Context(environment.prepare(recipe.device, recipe.seed, recipe.threads), recipe.seed)
    artifact = bring(recipe, context)
    if first:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.yaml", to_yaml(recipe.plain()))
    with logged_to(out / "log.txt"):
        say(f"{recipe.name}: {len(recipe.steps)} steps, {len(recipe.evaluate)} tasks, in {out}")
        names = recipe.stage_names
        compared = names[recipe.baseline_stages[0] :]
        measured = compared if recipe.stages == "all" else list(dict.fromkeys((compared[0], compared[-1])))
        stages: dict[str, Stage] = {}
        for name, step in zip(names, (None, *recipe.steps), strict=True):
            artifact = make_stage(step, artifact, out / name, context)
            stages[name] = Stage(name, artifact, artifact.measurements)
            if name in measured and first:
                base = stages[measured[0]].artifact
                stages[name] = question(stages[name], recipe.evaluate, out, context.device, base, cache)
                more = answer_by("clocks", recipe.evaluate) or (
                    name != measured[-1] and answer_by("against", recipe.evaluate)
                )
                gate.check(recipe.rules, stages[name].measurements, more)
        if not first:
            return None
        stages |= take_times({n: stages[n] for n in measured}, recipe.evaluate, out, context.device)
        parts = [*recipe.steps, *recipe.evaluate]
        return finish(recipe.plain(), parts, stages, measured[0], out, context, recipe.rules)


def evaluate(
    artifacts: Mapping[str, Artifact],
    tasks: Sequence[Task],
    out: Path,
    context: Context,
    asked: Mapping[str, Any],
    cache: bool = True,
) -> Report:
    """Question models that exist already; the first of them is the base."""
    reading.hashes(tasks)  # what lacks is said before a model is opened
    out.mkdir(parents=True, exist_ok=True)
    with logged_to(out / "log.txt"):
        first, base = next(iter(artifacts.items()))
        stages = {n: question(Stage(n, a), tasks, out, context.device, base, cache) for n, a in artifacts.items()}
        stages |= take_times(stages, tasks, out, context.device)
        return finish(asked, tasks, stages, first, out, context)


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """See that the run folder is new or empty, or that a resumed one holds this very recipe."""
    kept = out / "recipe.yaml"
    if resume:
        if not kept.is_file():
            raise UserError(f"there is nothing to resume in {str(out)!r}")
        if yaml.safe_load(kept.read_text()) != json.loads(json.dumps(recipe.plain(), default=str)):
            raise UserError(
                f"{str(kept)!r} holds another recipe; resume with the one it was run with, or use a new --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{str(out)!r} is not empty; use a new --out (llmq run can go on there with --resume)")


def bring(recipe: Recipe, context: Context) -> Artifact:
    """The base, before anything is written; that it may be packed already is only seen now."""
    began = time.perf_counter()
    say("bringing the base")
    if not processes.is_first():
        processes.wait(context.device)
    base = recipe.model.base(context)
    if processes.is_first():
        processes.wait(context.device)
    check_order(recipe.model.kind, recipe.steps, Source(recipe.name, None), {"packed": base.packed})
    for step in recipe.steps:
        try:
            step.check_base(base)
        except UserError as error:
            raise UserError(f"{recipe.name}: {step.word}: {error}") from None
    reading.hashes([*recipe.steps, *recipe.evaluate])
    return replace(base, notes={**base.notes, "seconds": round(time.perf_counter() - began, 3)})


def to_yaml(plain: Mapping[str, Any]) -> str:
    """YAML as a person would write it."""
    return str(
        yaml.safe_dump(json.loads(json.dumps(plain, default=str)), sort_keys=False, allow_unicode=True, width=110)
    )


def make_stage(step: Step | None, before: Artifact, folder: Path, context: Context) -> Artifact:
    """What `step` makes of the stage before, or without a step the base. Made once, reopened on resuming."""

    def fill(partial: Path) -> None:
        began = time.perf_counter()
        made = step.apply(before, partial, context) if step else before
        seconds = {"seconds": round(time.perf_counter() - began, 3)} if step else {}
        replace(made, notes={**made.notes, **seconds}).save(partial)

    processes.wait(context.device)
    done = folder.exists()
    processes.wait(context.device)  # all have looked before the first makes it
    say(f"{folder.name}{': already there' if done else ''}")
    if processes.is_first():
        make_whole(folder, fill)
    elif step and step.in_every_process and not done:
        step.apply(before, folder.with_name(f".{folder.name}.partial"), context)
    processes.wait(context.device)
    return Artifact.load(folder)


def question(stage: Stage, tasks: Sequence[Task], out: Path, device: str, base: Artifact, cache: bool = True) -> Stage:
    """Put every task to one stage, open alone, then beside `base`; kept in its folder, not asked again on resuming.

    With `cache`, what was answered before to the very same question about the very same model is used again.
    """
    folder = out / stage.name
    kept = folder / "measurements.json"
    if not kept.exists():
        folder.mkdir(exist_ok=True)
        answers: list[Answer] = list(stage.artifact.measurements)
        with Interview(stage.artifact, base, device, cache) as interview:
            for name, task in named(tasks).items():
                answers += ask(name, task, interview.score(name, task), stage.name, answers)
            for name, task in named(tasks).items() if stage.artifact != base else ():
                if answer_by("against", [task]):
                    answers += ask(name, task, interview.against(name, task), stage.name, answers)
        measurements = [a for a in answers if isinstance(a, Measurement)]
        exhibits = [keep_picture(a, out, stage.name) for a in answers if isinstance(a, Exhibit)]
        for attachment in (a for a in answers if isinstance(a, Attachment)):
            (folder / attachment.file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / attachment.file, attachment.text)
        write_samples(measurements, folder / "samples")
        plain = [asdict(m) for m in measurements]
        reused = list(dict.fromkeys(interview.reused))
        told = {"schema_version": SCHEMA_VERSION, "measurements": plain, "exhibits": exhibits, "reused": reused}
        write_json(kept, told)
    data = json.loads(kept.read_text())
    return replace(
        stage,
        measurements=tuple(measurement_from(m) for m in data["measurements"]),
        exhibits=tuple(Exhibit(**e) for e in data["exhibits"]),
        reused=tuple(data.get("reused", ())),
    )


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


def named(tasks: Sequence[Task]) -> dict[str, Task]:
    """Tasks by the name that their measurements go under; the second of one word is `perplexity-2`."""
    names: dict[str, Task] = {}
    for task in tasks:
        number = 1 + sum(other.name == task.name for other in names.values())
        names[task.name if number == 1 else f"{task.name}-{number}"] = task
    return names


def filed(task: str, name: str, asked: Task) -> str:
    """`task` as its measurement says, under the name that tells two tasks of one word apart."""
    return name if task == asked.name else task


def ask(name: str, task: Task, answers: Iterable[Answer], stage: str, before: Iterable[Answer]) -> Iterator[Answer]:
    """What a task answers, filed under its name, or beside a figure of `before` under both; says how long that took."""
    began, taken = time.perf_counter(), {(a.task, a.metric) for a in before if isinstance(a, Measurement)}
    for answer in answers:
        its = filed(answer.task, name, task)
        again = isinstance(answer, Measurement) and (its, answer.metric) in taken  # one task of lm-eval, asked twice
        yield replace(answer, task=f"{its} ({name})" if again else its)
    say(f"  {stage}  {name:<14} {time.perf_counter() - began:6.1f} s")


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
    with ExitStack() as open_stages:
        loaded = {name: open_stages.enter_context(s.artifact.open(device)) for name, s in stages.items()}
        clocks = {stage: list(_clocks(tasks, model)) for stage, model in loaded.items()}
        taken = measure.interleave(clocks, device)
    for name, measurements in taken.items():
        write_samples(measurements, out / name / "samples")
        told = {"schema_version": SCHEMA_VERSION, "measurements": [asdict(m) for m in measurements]}
        write_json(out / name / "clocks.json", told)
    say(f"  all stages in turn: clocks {time.perf_counter() - began:.1f} s")
    return {n: replace(stages[n], measurements=(*stages[n].measurements, *taken[n])) for n in stages}


def _clocks(tasks: Sequence[Task], loaded: Loaded) -> Iterator[Clock]:
    for name, task in named(tasks).items():
        for clock in task.clocks(loaded):
            yield replace(clock, task=filed(clock.task, name, task))


def finish(
    asked: Mapping[str, Any],
    parts: Sequence[Plugin],
    stages: Mapping[str, Stage],
    baseline: str,
    out: Path,
    context: Context,
    rules: Sequence[Rule] = (),
) -> Report:
    """Build the report with the verdicts on the last stage, and write its faces."""
    base = stages[baseline].artifact
    facts = environment.describe(context.device, context.seed)
    facts["model_sha256"] = sha256_files(base.weight_files())
    facts["data_sha256"] = reading.hashes(parts)
    facts["dtype"] = getattr(base.model, "dtype", None)
    report = Report.of(asked, facts, list(stages.values()), baseline)
    try:
        if rules:
            last = stages[report.measured[-1]]
            verdicts = gate.judge(rules, last.name, last.measurements, stages[baseline].measurements)
            report = replace(report, gate=gate_as_data(verdicts))
    finally:  # a rule that names nothing measured must not cost the report
        report.write(out)
        replay.record(out)
    return report

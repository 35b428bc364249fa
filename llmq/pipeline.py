"""The whole job, from the base to the report."""

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import environment, hashes, measure, plugin, processes, reading, sound, stopping, together, trackers, trust
from llmq.artifact import Artifact, Failure, Stage
from llmq.errors import UserError, one_line
from llmq.files import check_space, make_whole, sha256_files, write_json, write_text
from llmq.guarded.files import read_json_object
from llmq.judge import gate
from llmq.judge.protocols import stored_otherwise
from llmq.questions import overrides, question, take_times
from llmq.recipe import Recipe, check_order, of_weights
from llmq.report import Report, card, faces
from llmq.rules import Rule
from llmq.runs import folder as run_folder
from llmq.runs import paths as run_paths
from llmq.source import Source, read, to_yaml
from llmq.terminal import counted, logged_to, say
from llmq.types import Context, JsonObject, Plugin, Step, Task

if TYPE_CHECKING:
    from llmq.planning import Plan

BEGUN = "begun.json"
"""The file of a half stage with the hashes of the data that it is made from."""


def run(
    recipe: Recipe, out: Path, resume: bool = False, cache: bool = True, foretold: "Plan | None" = None
) -> Report | None:
    """Bring the base, apply the steps, question every stage, report. A whole stage is never lost.

    The report sets what was `foretold` beside what was measured. Where a launcher started several processes they share
    training and questions; only the first writes and returns a report.
    """
    if processes.count() > 1:  # each has named the folder before the first makes it, or the next would name another
        processes.wait(environment.prepare(recipe.device, recipe.seed, recipe.threads))
    if not processes.is_first():
        return _run(recipe, out, cache, foretold)
    check_folder(recipe, out, resume)
    with run_folder.held(out):
        check_folder(recipe, out, resume)  # again: under the lock nobody else writes there
        report = _run(recipe, out, cache, foretold, resume)
    stopping.resumable = None
    return report


def _run(recipe: Recipe, out: Path, cache: bool, foretold: "Plan | None", resume: bool = False) -> Report | None:
    first, began = processes.is_first(), time.perf_counter()
    context = prepare(recipe)
    artifact = bring(recipe, context)
    if first:
        write_text(out / "recipe.yaml", to_yaml(recipe.plain()))
        stopping.resumable = out
    with logged_to(out / "log.txt"), environment.set_aside():
        say(f"{recipe.name}: {counted(len(recipe.steps), 'step')}, {counted(len(recipe.evaluate), 'task')}, in {out}")
        if foretold:  # only now: wrong input is one line
            say(foretold.line())
        reads = say_reads(recipe.steps, recipe.evaluate, _made_by(recipe))
        say_alone([*recipe.steps, *recipe.evaluate])
        names = recipe.stage_names
        compared = names[recipe.baseline_stages[0] :]
        measured = compared if recipe.stages == "all" else list(dict.fromkeys((compared[0], compared[-1])))
        stages: dict[str, Stage] = {}
        for name, step in zip(names, (None, *recipe.steps), strict=True):
            artifact = make_stage(step, artifact, out / name, context)
            stages[name] = Stage(name, artifact, artifact.measurements)
            if name in measured and not first:
                together.follow(context.device)
            elif name in measured:
                base = stages[measured[0]].artifact
                with together.leading(context.device):
                    stages[name] = question(stages[name], recipe.evaluate, out, context.device, base, cache)
                more = overrides("clocks", recipe.evaluate) or (
                    name != measured[-1] and overrides("against", recipe.evaluate)
                )
                gate.check(recipe.rules, stages[name].measurements, more or bool(stages[name].failures))
        if not first:
            return None
        stages |= take_times({n: stages[n] for n in measured}, recipe.evaluate, out, context.device)
        parts = [*recipe.steps, *recipe.evaluate]
        seconds = None if resume else round(time.perf_counter() - began, 3)
        about = {"foretold": foretold.plain() if foretold else None, "seconds": seconds}
        report = finish(recipe.plain(), parts, stages, measured[0], out, context, recipe.rules, reads, about)
        trackers.hand_over(recipe.track, report, out)
        return report


def evaluate(
    artifacts: Mapping[str, Artifact],
    tasks: Sequence[Task],
    out: Path,
    context: Context,
    asked: JsonObject,
    cache: bool = True,
    steps: Sequence[Step] = (),
) -> Report:
    """Evaluate existing models; the first is the base, and `steps` are those of the run that made them.

    Where a launcher started several processes the others must `follow`.
    """
    reading.hashes(tasks)  # missing data is reported before a model is opened
    for name, artifact in artifacts.items():
        reading.check_base(name, (), tasks, artifact, steps)
    with run_folder.held(out), logged_to(out / "log.txt"), environment.set_aside():
        reads = say_reads(steps, tasks)
        say_alone(tasks)
        first, base = next(iter(artifacts.items()))
        with together.leading(context.device):
            stages = {n: question(Stage(n, a), tasks, out, context.device, base, cache) for n, a in artifacts.items()}
        stages |= take_times(stages, tasks, out, context.device)
        return finish(asked, tasks, stages, first, out, context, reads=reads)


def export(artifact: Artifact, step: Step, out: Path, context: Context) -> Artifact:
    """Write the stage that an export makes of a model at rest to `out`; an adapter is merged first."""
    steps: list[Any] = [plugin.build("adapt.merge"), step] if artifact.adapter else [step]
    check_order(artifact.model.kind, steps, Source("command line", {}), artifact)
    reading.check_base(artifact.weights.name, steps, (), artifact)
    merged = out.with_name(f".{out.name}.merged")
    try:
        for each in steps:
            if each is not step:
                say("the adapter is merged first")
            artifact = make_stage(each, artifact, out if each is step else merged, context)
            for lost in artifact.measurements if each is not step else ():
                say(f"  {lost.metric.replace('_', ' ')} {lost.value:.3g} {lost.unit}: {lost.convention}")
    finally:
        # What is left where an export failed is of no use, unlike the half stage of a run, which goes on.
        for place in (merged, *(folder.with_name(f".{folder.name}.partial") for folder in (merged, out))):
            shutil.rmtree(place, ignore_errors=True)
    return artifact


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Raise `UserError` unless the run folder is empty, or is resumed and holds this very recipe, or nothing yet."""
    kept = out / "recipe.yaml"
    if out.is_dir() and (resume or not run_folder.holds(out)):
        run_paths.check(out)
    if resume:
        if out.is_dir() and not run_folder.holds(out):  # killed before anything was written
            return
        if not kept.is_file():
            raise UserError(f"there is nothing to resume in {str(out)!r}")
        if read(kept).data != json.loads(json.dumps(recipe.plain(), default=str)):
            raise UserError(
                f"{str(kept)!r} holds another recipe; resume with the one it was run with, or use a new --out"
            )
    elif run_folder.holds(out):
        raise UserError(f"{str(out)!r} is not empty; use a new --out, or go on there with --resume")


def prepare(recipe: Recipe) -> Context:
    """Read all data, then prepare the machine: data is most often at fault, and to load libraries takes seconds."""
    environment.quieten()
    reading.hashes([*recipe.steps, *recipe.evaluate])
    return Context(environment.prepare(recipe.device, recipe.seed, recipe.threads), recipe.seed)


def bring(recipe: Recipe, context: Context) -> Artifact:
    """Bring the base, and check that all data fits it, before anything is written.

    Only a base that is here tells whether it is packed.
    """
    began = time.perf_counter()
    say("bringing the base")
    with processes.first_does(context.device):
        base = recipe.model.base(context)
    check_order(recipe.model.kind, recipe.steps, Source(recipe.name, None), base)
    reading.check_base(recipe.name, recipe.steps, recipe.evaluate, base, _made_by(recipe))
    return replace(base, notes={**base.notes, "seconds": round(time.perf_counter() - began, 3)})


def _made_by(recipe: Recipe) -> Sequence[Step]:
    """The steps of the run whose stage the model is."""
    before = of_weights(recipe.model)
    return before.steps if before else ()


def say_reads(steps: Sequence[Step], tasks: Sequence[Task], made_by: Sequence[Step] = ()) -> list[str]:
    """Log the data that each step and task reads, and return the lines for the report."""
    lines = reading.told(steps, tasks, made_by)
    for line in lines:
        say(f"  {line}")
    return lines


def say_alone(parts: Sequence[Step | Task]) -> None:
    """Log which parts of a run the first of several processes does alone."""
    alone = dict.fromkeys(part.word.removeprefix("tasks.") for part in parts if not part.in_every_process)
    if alone and processes.count() > 1:
        say(f"  of {processes.count()} processes the first alone does {', '.join(alone)}")


def make_stage(step: Step | None, before: Artifact, folder: Path, context: Context) -> Artifact:
    """The stage that `step` makes of the one before, or without a step the base; a resumed run reopens it."""

    def fill(partial: Path) -> None:
        if step:
            check_space(folder, step.space(before), f"stage {folder.name}")
        made, spent = before, {}
        if step:
            _begin(step, partial, folder)
            began = time.perf_counter()
            with environment.set_aside(), environment.without_holes(), measure.peak_memory(context.device) as peak:
                made = applied(step, before, partial, context)
            alone = max(0, peak.bytes - measure.memory_now(context.device))  # every library is loaded by now
            helped = {"processes": together.count()} if together.count() > 1 else {}
            spent = {**helped, "seconds": round(time.perf_counter() - began, 3), "peak_memory": alone}
            (partial / BEGUN).unlink(missing_ok=True)
        trusted = {"trusted": trust.told()} if trust.told() else {}
        about = {} if step else {"files": hashes.of_base(before)}
        replace(made, notes={**made.notes, **spent, **trusted}).save(partial, **about)

    processes.wait(context.device)
    done = folder.exists()
    processes.wait(context.device)  # every process has looked before the first makes the folder
    say(f"{folder.name}{': already there' if done else ''}")
    is_led = step is not None and step.is_led and not done
    if processes.is_first():
        with together.leading(context.device) if is_led else nullcontext():
            make_whole(folder, fill)
    elif is_led:
        together.follow(context.device)
    elif step and step.in_every_process and not done:
        applied(step, before, folder.with_name(f".{folder.name}.partial"), context)
    processes.wait(context.device)
    stage = Artifact.load(folder)
    if done and step:
        _check_same_data(step, stage, folder)
    elif done:
        hashes.check_base(stage, folder)
    return stage


def _check_same_data(step: Step, stage: Artifact, folder: Path) -> None:
    """Raise `UserError` for a stage of a resumed run whose notes tell of other data than lies there now."""
    about = stage.notes.get("data") or stage.notes.get("calibration", {}).get("data") or {}
    now = {data.read().sha256: reading.called(data) for data in reading.data_of(step)}
    if now and about.get("sha256", next(iter(now))) not in now:
        raise _of_other_data(folder, now.values())


def _begin(step: Step, partial: Path, folder: Path) -> None:
    """Note the data that a stage is made from. Raises `UserError` for a half stage that was begun with other data."""
    now = reading.hashes([step])
    begun = partial / BEGUN
    if begun.exists() and read_json_object(begun) != now:
        raise _of_other_data(folder, now)
    write_json(begun, now)


def _of_other_data(folder: Path, names: Iterable[str]) -> UserError:
    return UserError(
        f"{str(folder)!r} was made from other data than {', '.join(names)} is now; bring back what was read then, or "
        "use a new --out"
    )


def applied(step: Step, before: Artifact, folder: Path, context: Context) -> Artifact:
    """The artifact that a step makes of a stage, checked to be sound; the step's errors bear its name."""
    with reading.asking(step.word):
        made = step.apply(before, folder, context)
        if processes.is_first():
            sound.check(step.word, made, folder)
        return made


def finish(
    asked: JsonObject,
    parts: Sequence[Plugin],
    stages: Mapping[str, Stage],
    baseline: str,
    out: Path,
    context: Context,
    rules: Sequence[Rule] = (),
    reads: Sequence[str] = (),
    about: Mapping[str, Any] = {},
) -> Report:
    """Build the report with the verdicts on the last stage, and write all formats of the report.

    `about` holds the plan that was `foretold`, and the `seconds` of a run that was not resumed.
    """
    base = stages[baseline].artifact
    facts = environment.describe(context.device, context.seed)
    facts["model_sha256"] = sha256_files(base.weight_files())
    facts["data_sha256"], facts["reads"] = reading.hashes(parts), list(reads)
    # A graph's precision is its own, and stands in every convention.
    facts["dtype"] = None if base.runtime == "openvino" else getattr(base.model, "dtype", None)
    facts["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    facts["called_from"], facts["run"] = str(Path.cwd()), str(out.resolve())  # relative paths start here
    report = replace(Report.of(asked, facts, list(stages.values()), baseline), **about)
    try:
        if rules:
            report = judged(report, rules, stages, baseline)
    finally:  # a rule that names nothing measured must not cost the report
        report.save(out)
        faces.write(out)
        card.write(report, out, base.weights, base.model.kind)
        hashes.record(out)
    return report


def judged(report: Report, rules: Sequence[Rule], stages: Mapping[str, Stage], baseline: str) -> Report:
    """The report with the verdicts on the last stage; a rule on a figure that a failed task owes is a failure, too."""
    last = [stage for stage in stages.values() if stage.measurements or stage.failures][-1]
    try:
        base = stages[baseline]
        stored = stored_otherwise(last.artifact.stored, base.artifact.stored)
        verdicts = gate.judge(rules, last.name, last.measurements, base.measurements, stored)
        return replace(report, gate=gate.as_data(verdicts))
    except UserError as error:
        if not report.failures:
            raise
        failed = Failure("gate", "rules", one_line(error))
        return replace(report, failures=[*report.failures, {"stage": last.name, **asdict(failed)}])

"""The whole job, in the order it happens."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmq import (
    environment,
    gate,
    processes,
    reading,
    replay,
    run_folder,
    run_paths,
    run_recipe,
    sound,
    stopping,
    trust,
)
from llmq.artifact import Artifact
from llmq.errors import UserError, one_line
from llmq.files import check_space, make_whole, sha256_files, stored_as, write_text
from llmq.questions import answer_by, question, take_times
from llmq.recipe import Recipe, check_order
from llmq.report import Failure, Report, Stage
from llmq.report.table import stored_otherwise
from llmq.report.verdicts import gate_as_data
from llmq.rules import Rule
from llmq.source import Source, read, to_yaml
from llmq.terminal import logged_to, say
from llmq.types import Context, Plugin, Step, Task


def run(recipe: Recipe, out: Path, resume: bool = False, cache: bool = True) -> Report | None:
    """Bring the base, apply the steps, question every stage, report. A whole stage is never lost.

    Where a launcher started several processes they share the training; only the first writes and returns a report.
    """
    if not processes.is_first():
        return _run(recipe, out, cache)
    check_folder(recipe, out, resume)
    with run_folder.held(out):
        check_folder(recipe, out, resume)  # again: now nobody else writes there
        report = _run(recipe, out, cache)
    stopping.resumable = None
    return report


def _run(recipe: Recipe, out: Path, cache: bool) -> Report | None:
    first = processes.is_first()
    context = Context(environment.prepare(recipe.device, recipe.seed, recipe.threads), recipe.seed)
    artifact = bring(recipe, context)
    if first:
        write_text(out / "recipe.yaml", to_yaml(recipe.plain()))
        stopping.resumable = out
    with logged_to(out / "log.txt"):
        say(f"{recipe.name}: {len(recipe.steps)} steps, {len(recipe.evaluate)} tasks, in {out}")
        reads = say_reads(recipe.steps, recipe.evaluate, _made_by(recipe))
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
                gate.check(recipe.rules, stages[name].measurements, more or bool(stages[name].failures))
        if not first:
            return None
        stages |= take_times({n: stages[n] for n in measured}, recipe.evaluate, out, context.device)
        parts = [*recipe.steps, *recipe.evaluate]
        return finish(recipe.plain(), parts, stages, measured[0], out, context, recipe.rules, reads)


def evaluate(
    artifacts: Mapping[str, Artifact],
    tasks: Sequence[Task],
    out: Path,
    context: Context,
    asked: Mapping[str, Any],
    cache: bool = True,
    steps: Sequence[Step] = (),
) -> Report:
    """Question models that exist already; the first of them is the base, and `steps` are those of their run."""
    reading.hashes(tasks)  # what lacks is said before a model is opened
    for name, artifact in artifacts.items():
        reading.check_base(name, (), tasks, artifact, steps)
    with run_folder.held(out), logged_to(out / "log.txt"):
        reads = say_reads(steps, tasks)
        first, base = next(iter(artifacts.items()))
        stages = {n: question(Stage(n, a), tasks, out, context.device, base, cache) for n, a in artifacts.items()}
        stages |= take_times(stages, tasks, out, context.device)
        return finish(asked, tasks, stages, first, out, context, reads=reads)


def check_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """See that the run folder is new or empty, or that a resumed one holds this very recipe, or nothing yet."""
    kept = out / "recipe.yaml"
    if out.is_dir() and (resume or not run_folder.holds(out)):
        run_paths.check(out)
    if resume:
        if out.is_dir() and not run_folder.holds(out):  # killed before anything was there to be kept
            return
        if not kept.is_file():
            raise UserError(f"there is nothing to resume in {str(out)!r}")
        if read(kept).data != json.loads(json.dumps(recipe.plain(), default=str)):
            raise UserError(
                f"{str(kept)!r} holds another recipe; resume with the one it was run with, or use a new --out"
            )
    elif run_folder.holds(out):
        raise UserError(f"{str(out)!r} is not empty; use a new --out (llmq run can go on there with --resume)")


def bring(recipe: Recipe, context: Context) -> Artifact:
    """The base, and all that is read seen to fit it, before anything is written.

    Data is read first: it is what most often cannot be used. Whether the base is packed is only known once it is here.
    """
    began = time.perf_counter()
    reading.hashes([*recipe.steps, *recipe.evaluate])
    say("bringing the base")
    if not processes.is_first():
        processes.wait(context.device)
    base = recipe.model.base(context)
    if processes.is_first():
        processes.wait(context.device)
    check_order(recipe.model.kind, recipe.steps, Source(recipe.name, None), {"packed": base.packed})
    reading.check_base(recipe.name, recipe.steps, recipe.evaluate, base, _made_by(recipe))
    return replace(base, notes={**base.notes, "seconds": round(time.perf_counter() - began, 3)})


def _made_by(recipe: Recipe) -> Sequence[Step]:
    """The steps of the run whose stage the model is."""
    before = run_recipe.of_weights(recipe.model)
    return before.steps if before else ()


def say_reads(steps: Sequence[Step], tasks: Sequence[Task], made_by: Sequence[Step] = ()) -> list[str]:
    """Say what each step and task reads, and hand it back for the report."""
    lines = reading.told(steps, tasks, made_by)
    for line in lines:
        say(f"  {line}")
    return lines


def make_stage(step: Step | None, before: Artifact, folder: Path, context: Context) -> Artifact:
    """What `step` makes of the stage before, or without a step the base. Made once, reopened on resuming."""

    def fill(partial: Path) -> None:
        if step:
            check_space(folder, step.space(before), f"stage {folder.name}")
        began = time.perf_counter()
        made = applied(step, before, partial, context) if step else before
        seconds = {"seconds": round(time.perf_counter() - began, 3)} if step else {}
        trusted = {"trusted": trust.told()} if trust.told() else {}
        replace(made, notes={**made.notes, **seconds, **trusted}).save(partial)

    processes.wait(context.device)
    done = folder.exists()
    processes.wait(context.device)  # all have looked before the first makes it
    say(f"{folder.name}{': already there' if done else ''}")
    if processes.is_first():
        make_whole(folder, fill)
    elif step and step.in_every_process and not done:
        applied(step, before, folder.with_name(f".{folder.name}.partial"), context)
    processes.wait(context.device)
    return Artifact.load(folder)


def applied(step: Step, before: Artifact, folder: Path, context: Context) -> Artifact:
    """What a step makes of a stage, seen to be sound; its errors bear its name."""
    with reading.asking(step.word):
        made = step.apply(before, folder, context)
        if processes.is_first():
            sound.check(step.word, made, folder)
        return made


def finish(
    asked: Mapping[str, Any],
    parts: Sequence[Plugin],
    stages: Mapping[str, Stage],
    baseline: str,
    out: Path,
    context: Context,
    rules: Sequence[Rule] = (),
    reads: Sequence[str] = (),
) -> Report:
    """Build the report with the verdicts on the last stage, and write its faces."""
    base = stages[baseline].artifact
    facts = environment.describe(context.device, context.seed)
    facts["model_sha256"] = sha256_files(base.weight_files())
    facts["data_sha256"], facts["reads"] = reading.hashes(parts), list(reads)
    facts["dtype"] = getattr(base.model, "dtype", None)
    facts["called_from"], facts["run"] = str(Path.cwd()), str(out.resolve())  # what relative paths are meant from
    report = Report.of(asked, facts, list(stages.values()), baseline)
    try:
        if rules:
            report = judged(report, rules, stages, baseline)
    finally:  # a rule that names nothing measured must not cost the report
        report.write(out)
        replay.record(out)
    return report


def judged(report: Report, rules: Sequence[Rule], stages: Mapping[str, Stage], baseline: str) -> Report:
    """The report with the verdicts on the last stage; a rule on what a failed task did not measure is a failure too."""
    last = [stage for stage in stages.values() if stage.measurements or stage.failures][-1]
    try:
        base = stages[baseline]
        stored = stored_otherwise(*(stored_as(s.artifact.weight_files()) for s in (last, base)))
        verdicts = gate.judge(rules, last.name, last.measurements, base.measurements, stored)
        return replace(report, gate=gate_as_data(verdicts))
    except UserError as error:
        if not report.failures:
            raise
        failed = Failure("gate", "rules", one_line(error))
        return replace(report, failures=[*report.failures, {"stage": last.name, **asdict(failed)}])

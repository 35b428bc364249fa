"""The commands before a run: plan, check and copy."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llmq
from llmq import trust
from llmq.cli import completing
from llmq.cli.options import AllowCode, Json, Overrides, Trust
from llmq.errors import UserError, in_bytes, visible
from llmq.files import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmq.planning import Foretold, Plan

TITLES = ("stage", "params", "on disk", "memory", "making", "asking", "time")
LEGEND = "making, asking: peak of memory in the step and in the tasks, without libraries"


def plan(
    recipe: Annotated[str, typer.Argument(autocompletion=completing.recipes)],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder that the run would write; its disk is looked at.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Foretell sizes, memory, time, disk and downloads of a recipe; no weights and no data are needed.

    Two seconds measure this machine. Ends with 2 if something will not fit, and names the nearest setting that does.
    """
    made = llmq.plan(recipe, overrides or (), out=out, trust_remote_code=trust_remote_code)
    typer.echo(to_json(made.plain()) if as_json else as_text(made))
    if made.misfits:
        raise typer.Exit(2)


def as_text(plan: "Plan") -> str:
    """The plan as a terminal shows it."""
    from llmq.planning import duration

    lines = [*_table(plan.stages), "", LEGEND]
    reasons = [f"{stage.name}: {reason}" for stage in plan.stages for reason in stage.unknown]
    lines += ["", *reasons] if reasons else []
    memory, disk = "unknown", "unknown" if plan.disk is None else in_bytes(plan.disk)
    if plan.peak_memory is not None:
        libraries = f"of which {in_bytes(plan.libraries)} are libraries" if plan.libraries else "on the card"
        memory = f"about {in_bytes(plan.peak_memory + plan.libraries)}, {libraries}"
    lines += [
        "",
        f"time     {duration(plan.seconds)}",
        f"memory   {memory}; {in_bytes(plan.machine['memory'])} are there",
        f"disk     {disk}; {in_bytes(plan.machine['disk'])} are free",
        f"download {f'{plan.download}, {in_bytes(plan.download_bytes)}' if plan.download else 'nothing'}",
        *(f"WILL NOT FIT: {misfit}" for misfit in plan.misfits),
    ]
    return visible("\n".join(lines))


def _table(stages: "Sequence[Foretold]") -> list[str]:
    """A line a stage under the titles, no column wider than its longest entry."""
    rows = [TITLES, *map(_row, stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        " ".join(f"{entry:{'<>'[i > 0]}{width}}" for i, (entry, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _row(stage: "Foretold") -> tuple[str, ...]:
    from llmq.planning import duration

    sizes = (stage.bytes_on_disk, stage.bytes_in_memory, stage.peak_of_step, stage.peak_of_tasks)
    spent = (stage.seconds_of_step, stage.seconds_of_tasks)
    time = None if None in spent else sum(s or 0.0 for s in spent)
    count = "?" if stage.parameters is None else f"{stage.parameters / 1e6:,.1f}M"
    return stage.name, count, *("—" if s is None else in_bytes(s) for s in sizes), duration(time)


def check(
    recipe: Annotated[str, typer.Argument(autocompletion=completing.recipes)],
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Read all data, too, and see that it fits the base.")] = False,
    trust_remote_code: Trust = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Check a recipe without running it, and name the data that each of its steps and tasks reads.

    With --data, do all that a run does before its first step: read the data, bring the base, see that they fit.
    """
    from llmq import listing, reading, support
    from llmq import recipe as recipes
    from llmq.source import to_yaml
    from llmq.terminal import counted

    trust.given(trust_remote_code, allow_code)
    job = recipes.load(recipe, overrides or ())
    if data:
        from llmq import pipeline

        pipeline.bring(job, pipeline.prepare(job))
    typer.echo(to_json(job.plain()) if as_json else listing.as_seen(to_yaml(job.plain())), nl=as_json)
    if not as_json:
        made_by = recipes.of_weights(job.model)
        for line in reading.told(job.steps, job.evaluate, made_by.steps if made_by else ()):
            typer.echo(visible(f"# {line}"))
        for line in reading.counted([*job.steps, *job.evaluate]) if data else ():
            typer.echo(visible(f"# {line}"))
        for line in support.foretold(job.model, [*job.steps, *job.evaluate]):
            typer.echo(visible(f"# {line}"))
        asked = f"{counted(len(job.steps), 'step')}, {counted(len(job.evaluate), 'task')}"
        typer.echo(visible(f"# {recipe}: {asked}; ready to run"), err=True)


def copy(
    recipe: Annotated[str, typer.Argument(autocompletion=completing.recipes)], folder: Path, as_json: Json = False
) -> None:
    """Copy a bundled recipe into FOLDER, to be changed."""
    from llmq import recipe as recipes
    from llmq.runs.folder import no_file

    source = recipes.find("recipes", recipe)
    target = folder / source.name
    no_file(folder)
    if target.exists():
        raise UserError(f"{str(target)!r} exists; move it away first")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    told = visible(f"{target}: run it with: llmq run {shlex.quote(str(target))}")
    typer.echo(to_json({"recipe": str(target)}) if as_json else told)

"""The command that foretells a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llmq
from llmq import cli_completing
from llmq.cli_options import Json, Overrides, Trust
from llmq.errors import in_bytes, visible
from llmq.files import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmq.planning import Foretold, Plan

TITLES = ("stage", "params", "on disk", "memory", "making", "asking", "time")
LEGEND = "making, asking: peak of memory in the step and in the tasks, without libraries"


def plan(
    recipe: Annotated[str, typer.Argument(autocompletion=cli_completing.recipes)],
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

"""The command that runs many runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llmq
from llmq.cli import completing
from llmq.cli.options import Json, Trust
from llmq.errors import Answered, visible
from llmq.files import to_json

if TYPE_CHECKING:
    from llmq.sweeping.points import Swept


def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", autocompletion=completing.sweeps)],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; runs/NAME of the file if unset.")] = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster: auto, host:port, or local for one here.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a recipe under many settings, as a bundled sweep or a YAML file says; finished runs are skipped.

    Ends with 4 if a run failed twice, and with 1 if no run passes the gate of the sweep.
    """
    swept = llmq.sweep(file, out=out, ray=ray, trust_remote_code=trust_remote_code)
    typer.echo(to_json(swept.plain()) if as_json else as_text(swept))
    if swept.failed:
        raise Answered(
            f"{len(swept.failed)} of {len(swept.points)} runs failed: {', '.join(p.name for p in swept.failed)}"
        )
    if swept.best is None:
        raise typer.Exit(1)


def as_text(swept: "Swept") -> str:
    """The table of a sweep; a star stands at the Pareto front."""
    lines = []
    for point in swept.points:
        figures = "  ".join(f"{name} {value:.6g}" for name, value in point.figures.items())
        star = "*" if point.name in swept.front else " "
        ended = figures if point.done else f"FAILED with {point.code}, see {point.name}.log"
        lines.append(f"{star} {point.name}  {ended}  {point.gate}".rstrip())
        lines += [f"    not ranked beside the first: {point.unlike}"] if point.unlike else []
    best = swept.best or ("none passes the gate" if any(p.done for p in swept.points) else "none ended")
    page = swept.folder / "compare.html"
    return visible("\n".join([*lines, f"best: {best}", *([f"page: {page}"] if page.is_file() else ())]))

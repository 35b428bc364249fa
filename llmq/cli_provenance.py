"""The commands that hold a run to its word: verify and replay."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Answer with data on standard output.")]


def verify(run: Run, as_json: Json = False) -> None:
    """Check the hash of every file of RUN, and of the base that it began from: 0 whole, 1 not."""
    from llmq import replay

    found = replay.verify(run)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "whole": found.whole}))
    else:
        for kind in ("changed", "missing", "added"):
            for name in getattr(found, kind):
                typer.echo(f"{kind:>8}  {name}")
        if found.base:
            typer.echo(f"    base  {found.base}")
        typer.echo(f"{found.same} files as they were: {'whole' if found.whole else 'NOT what was run'}")
    if not found.whole:
        raise typer.Exit(1)


def replay(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN-replay if unset.")] = None,
    as_json: Json = False,
) -> None:
    """Run the recipe of RUN again, everything measured anew, and say what differs: 0 nothing, 1 something."""
    from llmq import replay as replays

    found = replays.replay(run, out or run.resolve().with_name(f"{run.resolve().name}-replay"))
    if as_json:
        typer.echo(json.dumps(found.plain()))
    else:
        for title, differences in (("now otherwise", found.surroundings), ("DIFFERS", found.differences)):
            for d in differences:
                typer.echo(f"{title:>13}  {d.what}: {d.then} then, {d.now} now")
        verdict = "the same" if found.same else f"{len(found.differences)} differ"
        typer.echo(
            f"{found.files} files and {found.figures} figures came back, {verdict}; the replay is {found.folder}"
        )
    if not found.same:
        raise typer.Exit(1)

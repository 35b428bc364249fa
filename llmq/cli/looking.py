"""The commands that look: list, show, runs and doctor."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmq.cli import completing
from llmq.cli.options import Json
from llmq.errors import UserError, did_you_mean, visible
from llmq.files import to_json


def list_words(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="models, data, quantize, …, recipes, sweeps or evals; all if unset.",
            autocompletion=completing.kinds,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List every word, recipe, sweep and suite, or those of one kind."""
    from llmq import listing

    found = listing.everything()
    if kind is not None:
        kinds = listing.by_kind(found)
        if kind not in kinds:
            raise UserError(f"{kind!r} is no kind of words{did_you_mean(kind, kinds)}")
        found = {kind: kinds[kind]}
    typer.echo(to_json(found) if as_json else listing.as_text(found))


def show(
    name: Annotated[str, typer.Argument(metavar="WORD|RECIPE|SWEEP|SUITE|RUN", autocompletion=completing.shown)],
    as_json: Json = False,
) -> None:
    """Show the settings of a word (quantize.bnb, or bnb), a recipe (text/quickstart), sweep or suite, a run's table."""
    from llmq import listing, plugin
    from llmq.source import KINDS, find, names, read

    name = listing.in_full(name)
    kind = next((kind for kind in KINDS if name in names(kind)), None)
    if not kind and "/" in name and not Path(name).is_dir():
        near = did_you_mean(name, names("recipes"))
        raise UserError(f"{name!r} is no recipe (llmq list recipes) and no folder of a run (llmq runs){near}")
    if kind:
        file = find(kind, name)
        if as_json:
            typer.echo(to_json(read(file).data))
        else:
            typer.echo(listing.as_seen(file.read_text(encoding="utf-8")), nl=False)
        return
    folder = Path(name)
    if (folder / "report.json").is_file():
        from llmq.guarded.files import library
        from llmq.report import Report, screen
        from llmq.runs import paths

        paths.check(folder)
        with library(folder, "run"):
            report = Report.read(folder)
            typer.echo(to_json(asdict(report))) if as_json else screen.show(report)
        return
    if folder.is_dir():
        raise UserError(f"{name!r} holds no report.json: it is no run of llmq, or it did not end")
    cls = plugin.load(name)
    typer.echo(to_json(cls.model_json_schema()) if as_json else listing.settings_of(name, cls))


def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder, the latest first: recipe, model, stages, gate and headline."""
    from llmq import listing
    from llmq.report import shelf

    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; llmq run makes runs/")
    found = list(shelf.runs(folder))
    if as_json:
        typer.echo(to_json([asdict(run) for run in found]))
        return
    for run in found:
        gate = f"  gate {run.gate}" if run.gate else ""
        typer.echo(visible(f"{run.folder}  {run.ended}  {run.progress}{gate}"))
        for line in (" → ".join((run.model, *run.steps)), run.headline):
            typer.echo(listing.wrapped("    ", visible(line)))


def doctor(as_json: Json = False) -> None:
    """Say what this machine is, and which words can run here; a block to copy into a bug report."""
    from llmq import doctor as machine
    from llmq import listing

    facts, lacks = machine.facts(), list(machine.lacks())
    if as_json:
        typer.echo(to_json({"machine": facts, "lacks": [asdict(lack) for lack in lacks]}))
        return
    for name, text in facts.items():
        typer.echo(listing.wrapped(f"{name:<12} ", visible(str(text))))
    for lack in lacks:
        typer.echo(f"\n{', '.join(lack.words)}\n    need {', '.join(lack.missing)}: {lack.cure}")
    if not lacks:
        typer.echo("\nevery word can run here")

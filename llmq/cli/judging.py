"""The commands that judge runs: gate and verify."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.cli import completing
from llmq.cli.options import Json
from llmq.errors import Answered, visible
from llmq.files import to_json
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.report import Report

Run = Annotated[Path, typer.Argument(metavar="RUN", autocompletion=completing.runs)]


def gate(
    target: Annotated[str, typer.Argument(metavar="RUN", autocompletion=completing.runs)],
    rule: Annotated[list[str], typer.Option(help="'perplexity <= 1.03x base', 'acc >= base - 1.0pt', 'psnr >= 30'.")],
    stage: Annotated[str | None, typer.Option(help="The stage to judge; the last if unset.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a run by rules, by the interval and never by the point.

    Exit codes: 0 all pass, 1 one fails or the base itself is broken, 3 undecided: too few samples.
    """
    from llmq.judge import gate as gates

    told = gates.as_data(gates.of_run(target, rule, stage))
    if as_json:
        typer.echo(to_json(told))
    end_gate(told, as_json)


def end(report: "Report", as_json: bool) -> None:
    """End with the exit code of a failed task if there is one, else with that of the gate."""
    from llmq.report import screen

    if not report.failures:
        end_gate(report.gate, as_json)
        return
    if report.gate and not as_json:
        screen.show_gate(report.gate)
    told = "; ".join(f"{f['stage']}: {f['task']}: {f['error']}" for f in report.failures)
    raise Answered(f"{len(report.failures)} failed, and the report holds the rest: {told}")


def end_gate(told: JsonObject | None, as_json: bool) -> None:
    """Print the verdicts of a gate, if there is one, and end with the exit code of the gate."""
    from llmq.report import screen

    if told and not as_json:
        screen.show_gate(told)
    if told and told["exit_code"]:
        raise typer.Exit(told["exit_code"])


def verify(run: Run, as_json: Json = False) -> None:
    """Check the hash of every file of RUN, and of the base that it began from: 0 whole, 1 not."""
    from llmq.judge import replay

    found = replay.verify(run)
    if as_json:
        typer.echo(to_json({**asdict(found), "whole": found.whole}))
    else:
        for kind in ("changed", "missing", "added"):
            for name in getattr(found, kind):
                typer.echo(visible(f"{kind:>8}  {name}"))
        if found.base:
            typer.echo(visible(f"    base  {found.base}"))
        typer.echo(f"{found.same} files as they were: {'whole' if found.whole else 'NOT as it was run'}")
    if not found.whole:
        raise typer.Exit(1)

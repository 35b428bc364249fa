"""The commands that judge runs: compare, gate, verify and replay."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmq.errors import LlmqError, UserError
from llmq.files import to_json
from llmq.harmless import visible

if TYPE_CHECKING:
    from llmq.report import Report

Run = Annotated[Path, typer.Argument(metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Answer with data on standard output.")]


def compare(targets: Annotated[list[str], typer.Argument(metavar="RUN...")], as_json: Json = False) -> None:
    """Set runs, stages or lm-eval's results_*.json side by side: differences, intervals, verdicts.

    A single run shows its stages; of several runs the last stage of each is taken. The first is what others are held
    against.
    """
    from llmq import compare
    from llmq.report import verdicts

    found = compare.side_by_side(compare.targets(targets))
    if as_json:
        typer.echo(to_json(verdicts.comparison_as_data(found)))
    else:
        verdicts.show_comparison(found)


def gate(
    target: Annotated[str, typer.Argument(metavar="RUN")],
    rule: Annotated[list[str], typer.Option(help="'perplexity <= 1.03x base', 'acc >= base - 1.0pt', 'psnr >= 30'.")],
    stage: Annotated[str | None, typer.Option(help="The stage to judge; the last if unset.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a run by rules, by the interval and never by the point.

    Exit codes: 0 all pass, 1 one fails or the base itself is broken, 3 undecided: too few samples.
    """
    from llmq.gate import of_run
    from llmq.report import verdicts

    told = verdicts.gate_as_data(of_run(target, rule, stage))
    if as_json:
        typer.echo(to_json(told))
    end_gate(told, as_json)


def end(report: "Report", as_json: bool) -> None:
    """End with the code of what failed, which goes before that of the gate."""
    from llmq.report import verdicts

    if not report.failures:
        end_gate(report.gate, as_json)
        return
    if report.gate and not as_json:
        verdicts.show_gate(report.gate)
    told = "; ".join(f"{f['stage']}: {f['task']}: {f['error']}" for f in report.failures)
    raise LlmqError(f"{len(report.failures)} failed, and the report holds the rest: {told}")


def end_gate(told: Mapping[str, Any] | None, as_json: bool) -> None:
    """Say what a gate comes to, if there was one, and end with its code."""
    from llmq.report import verdicts

    if told and not as_json:
        verdicts.show_gate(told)
    if told and told["exit_code"]:
        raise typer.Exit(told["exit_code"])


def verify(run: Run, as_json: Json = False) -> None:
    """Check the hash of every file of RUN, and of the base that it began from: 0 whole, 1 not."""
    from llmq import replay

    found = replay.verify(run)
    if as_json:
        typer.echo(to_json({**asdict(found), "whole": found.whole}))
    else:
        for kind in ("changed", "missing", "added"):
            for name in getattr(found, kind):
                typer.echo(visible(f"{kind:>8}  {name}"))
        if found.base:
            typer.echo(visible(f"    base  {found.base}"))
        typer.echo(f"{found.same} files as they were: {'whole' if found.whole else 'NOT what was run'}")
    if not found.whole:
        raise typer.Exit(1)


def replay(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN-replay if unset.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python that a folder which the recipe names brings.")
    ] = False,
    allow_code: Annotated[bool, typer.Option(help="Let tasks run the code that the model writes.")] = False,
    as_json: Json = False,
) -> None:
    """Run the recipe of RUN again, everything measured anew, and say what differs: 0 nothing, 1 something."""
    from llmq import replay as replays
    from llmq import trust

    trust.given(trust_remote_code, allow_code)

    if out and out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; name a folder")
    found = replays.replay(run, out or run.resolve().with_name(f"{run.resolve().name}-replay"))
    if as_json:
        typer.echo(to_json(found.plain()))
    else:
        for title, differences in (("now otherwise", found.surroundings), ("DIFFERS", found.differences)):
            for d in differences:
                typer.echo(visible(f"{title:>13}  {d.what}: {d.then} then, {d.now} now"))
        verdict = "the same" if found.same else f"{len(found.differences)} differ"
        typer.echo(
            f"{found.files} files and {found.figures} figures came back, {verdict}; the replay is {found.folder}"
        )
    if not found.same:
        raise typer.Exit(1)

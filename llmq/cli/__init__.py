"""The command line: words in, one call, an exit code out.

The commands that run stand here: recipes, those built from a model and data, searches, evaluations, exports, replays.
"""

import errno
import faulthandler
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from typer.exceptions import TyperException

from llmq import __version__, api, errors, stopping, trust
from llmq.cli import completing, judging, looking, planning, streams, sweeping, using
from llmq.cli.ending import failed, tell
from llmq.cli.options import DEFAULT_MODEL, AllowCode, Cache, Json, Opener, Out, Overrides, Trust
from llmq.errors import UserError, in_bytes, visible
from llmq.files import in_json, to_json, write_text
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.report import Report

app = typer.Typer(
    help="Make models small and prove what it cost.\n\nExit codes: 0 done, 2 wrong input, 4 the job failed. "
    "Of a gate: 1 failed, 3 undecided; of verify and replay: 1 differs.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


TaskOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TASK.KEY=VALUE]...", help="perplexity.limit=32, accuracy.data=photos/"),
]
Suite = Annotated[
    str | None,
    typer.Option(help="A suite in evals/, or a YAML file, to measure by.", autocompletion=completing.suites),
]
LmTasks = Annotated[str | None, typer.Option(help="lm-eval tasks instead: hellaswag,arc_easy")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions a task at most, with --tasks.")]
Seed = Annotated[int, typer.Option(min=0, help="Of data, training and sampling.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last whole stage.")]
Force = Annotated[bool, typer.Option("--force", help="Go on where a part is foretold not to fit.")]


class Trusted(TypedDict):
    """The code that this command allows to run."""

    trust_remote_code: bool
    allow_code: bool


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmq {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(
    recipe: Annotated[str, typer.Argument(autocompletion=completing.recipes)],
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option(help="Go on after the last whole stage.")] = False,
    cache: Cache = True,
    force: Force = False,
    trust_remote_code: Trust = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Run a whole recipe: a bundled name such as text/quickstart, or a YAML file."""
    trusted = Trusted(trust_remote_code=trust_remote_code, allow_code=allow_code)
    _run(api.load(recipe, overrides or (), **trusted), out, as_json, trusted, resume, cache, force)


def finetune(
    model: str,
    data: str,
    overrides: Overrides = None,
    bits: Annotated[int, typer.Option(help="4 or 8 to quantize the base first (QLoRA), 16 not to.")] = 4,
    merge: Annotated[bool, typer.Option(help="Fold the adapter into the weights at the end.")] = False,
    export: Annotated[
        str | None, typer.Option(help="Write the merged model for another engine at the end: gguf, openvino, …")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Our columns and DATA's: prompt=query,completion=reply")] = None,
    suite: Suite = None,
    tasks: LmTasks = None,
    limit: Limit = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL, fine-tune it on DATA with LoRA, measure every stage: QLoRA in one command."""
    if bits not in (4, 8, 16):
        raise UserError(f"--bits {bits}: 4, 8 or 16")
    asked = api.asked_of(suite, tasks, limit)
    plain = api.finetuning(model, data, bits, merge, export, columns, asked, seed)
    _run_built(plain, "finetune", overrides, out, as_json, trust_remote_code, resume, force)


def quantize(
    model: str,
    overrides: Overrides = None,
    method: Annotated[
        str,
        typer.Option(help="A word of quantize: bnb, gptq, int8, …", autocompletion=completing.words_of("quantize")),
    ] = "bnb",
    bits: Annotated[int | None, typer.Option(help="The method's own default if unset.")] = None,
    family: Annotated[str, typer.Option("--model", help="Opens MODEL: a word of models.")] = DEFAULT_MODEL,
    suite: Suite = None,
    tasks: LmTasks = None,
    limit: Limit = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL by one method and measure what it cost."""
    plain = api.quantizing(model, method, bits, family, api.asked_of(suite, tasks, limit), seed)
    _run_built(plain, f"quantize-{method}", overrides, out, as_json, trust_remote_code, resume, force)


def search(
    model: str,
    overrides: Overrides = None,
    size: Annotated[str | None, typer.Option(help="Bytes on disk at most: 0.40x of the base, or 100MB.")] = None,
    bits: Annotated[float | None, typer.Option(help="Bits a quantized weight at most, scales included.")] = None,
    kl: Annotated[float | None, typer.Option(help="Divergence from the base at most, in nats a token.")] = None,
    perplexity: Annotated[str | None, typer.Option(help="Perplexity at most: 1.05x of the base's.")] = None,
    macs: Annotated[str | None, typer.Option(help="Of an image model: multiplications at most, 0.5x.")] = None,
    top1: Annotated[str | None, typer.Option(help="Of a classifier: the drop of top-1 at most, 0.3pt.")] = None,
    map_: Annotated[str | None, typer.Option("--map", help="Of a detector: the drop of mAP at most, 0.01.")] = None,
    psnr: Annotated[str | None, typer.Option(help="Of super-resolution: the drop in dB at most, 0.1.")] = None,
    methods: Annotated[str, typer.Option(help="What is tried, by commas: gptq, awq, prune.layers.")] = "gptq",
    data: Annotated[str, typer.Option(help="A word or path of data to calibrate on.")] = "pydoc",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    sym: Annotated[bool, typer.Option("--sym", help="Symmetric grids, for kernels that read no others.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    suite: Suite = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    device: str = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Find bits and groups layer by layer within a budget, write them as a recipe, run it, and measure it.

    The costs are foretold once, from the gradient of the loss, and kept in the cache for every other budget. Each of
    the methods is run, and the best as measured is told: awq folds scales into what feeds a layer before GPTQ rounds,
    prune.layers drops blocks for as long as that is better. A budget of quality is met if the upper end of the 95 %
    interval is; else the command ends with 1.

    Of a stage of an image model --macs takes channels out layer by layer, taught by the whole network; --top1, --map
    and --psnr give int8 with layers back in float. Where the interval of a drop holds its bound it ends with 3.
    """
    found = api.search(
        model,
        overrides or (),
        size=size,
        bits=bits,
        kl=kl,
        perplexity=perplexity,
        macs=macs,
        top1=top1,
        map=map_,
        psnr=psnr,
        methods=[name.strip() for name in methods.split(",")],
        data=data,
        samples=samples,
        length=length,
        sym=sym,
        dtype=dtype,
        suite=suite,
        device=device,
        seed=seed,
        out=out,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        typer.echo(to_json({**found.told, "met": found.met, "folder": str(found.report.folder)}))
    else:
        _show(found.report, found.report.folder, as_json)
        typer.echo(visible(f"recipe: {found.report.folder / 'recipe.yaml'}"))
        if found.picture:
            typer.echo(visible(f"picture: {found.picture}"))
        typer.echo(visible(found.line))
    if found.code:
        raise typer.Exit(found.code)


def evaluate(
    target: Annotated[str, typer.Argument(autocompletion=completing.stages)],
    overrides: TaskOverrides = None,
    suite: Suite = None,
    tasks: LmTasks = None,
    limit: Limit = None,
    data: Annotated[str | None, typer.Option(help="A word or path of data that every task reads.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Copies of data sets: DIR/owner/name/*.parquet, *.jsonl")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with more lm-eval task files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of lm-eval.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask lm-eval's questions as a conversation.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, of a target that is no stage.")
    ] = None,
    allow_code: AllowCode = False,
    trust_remote_code: Trust = False,
    batch_size: Annotated[str, typer.Option(help="Texts at once, with --tasks; changes no score.")] = "auto",
    model: Opener = DEFAULT_MODEL,
    device: str = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    out: Out = None,
    cache: Cache = True,
    as_json: Json = False,
) -> None:
    """Measure a model (hub id, folder, built-in word), one stage of a run, or all stages of a run.

    Tasks that name no data read what the run of the stage read.
    """
    from llmq.runs.folder import fresh

    folder = fresh(out, f"eval-{Path(target).name}")
    report = api.evaluate(
        target,
        overrides or (),
        suite=suite,
        tasks=tasks,
        limit=limit,
        data=data,
        data_dir=data_dir,
        include_path=include_path,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        dtype=dtype,
        batch_size=batch_size,
        family=model,
        device=device,
        threads=threads,
        out=folder,
        cache=cache,
        trust_remote_code=trust_remote_code,
        allow_code=allow_code,
    )
    _show(report, folder, as_json)
    judging.end(report, as_json)


def export(
    target: Annotated[str, typer.Argument(metavar="STAGE", autocompletion=completing.stages)],
    to: Annotated[
        str,
        typer.Option(
            help="A word of export: gguf, openvino, onnx, compressed_tensors.",
            autocompletion=completing.words_of("export"),
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="type=q8_0")] = None,
    model: Opener = DEFAULT_MODEL,
    device: str = "auto",
    out: Out = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a stage, or any model, in the format of another engine; an adapter is merged first."""
    made = api.export(
        target, to, overrides or (), family=model, device=device, out=out, trust_remote_code=trust_remote_code
    )
    folder = made.weights
    told = {"folder": str(folder), "bytes_on_disk": made.bytes_on_disk, "notes": made.notes}
    typer.echo(to_json(told) if as_json else visible(f"{folder}: {in_bytes(made.bytes_on_disk)}"))
    if not as_json:
        typer.echo(visible(f"use it: {_opened_by(folder, made.model.kind)}"))


def compare(
    targets: Annotated[list[str], typer.Argument(metavar="RUN...", autocompletion=completing.stages)],
    html: Annotated[Path | None, typer.Option(help="Write the table as a page, too.")] = None,
    model: Opener = DEFAULT_MODEL,
    device: Annotated[str | None, typer.Option(help="To measure models on; that of the run if unset.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for measured models; a fresh one under runs/.")] = None,
    cache: Cache = True,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Set runs, stages, models or lm-eval's results_*.json side by side: differences, intervals, verdicts.

    A single run shows its stages; of several runs the last stage of each is taken. The others are compared
    with the first. A model (a .gguf file, a folder) is measured first, by the tasks of the first run, and the
    others anew beside it; answers that are known are used again.
    """
    from llmq.report import screen

    found = api.compare(
        *targets, family=model, device=device, out=out, cache=cache, trust_remote_code=trust_remote_code
    )
    if html:
        from llmq.report.html import draw_comparison

        write_text(html, draw_comparison(found))
    if as_json:
        typer.echo(to_json(found.plain()))
    else:
        screen.show_comparison(found)


def replay(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", autocompletion=completing.runs)],
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN-replay if unset.")] = None,
    trust_remote_code: Trust = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Run the recipe of RUN again, everything measured anew, and list the differences: 0 none, 1 some."""
    from llmq import pipeline
    from llmq.judge import replay as replays
    from llmq.runs.folder import no_file

    trust.given(trust_remote_code, allow_code)
    if out:
        no_file(out)
    target = out or run_folder.resolve().with_name(f"{run_folder.resolve().name}-replay")
    found = replays.replay(run_folder, target, lambda job, folder: pipeline.run(job, folder, cache=False))
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


def _run_built(
    plain: JsonObject,
    name: str,
    overrides: list[str] | None,
    out: Path | None,
    as_json: bool,
    trust_code: bool,
    resume: bool,
    force: bool,
) -> None:
    from llmq.source import to_yaml

    trusted = Trusted(trust_remote_code=trust_code, allow_code=False)
    job = api.load(plain, overrides or (), name=name, said_in="command line", **trusted)
    typer.echo(visible(to_yaml(job.plain())), err=True)
    _run(job, out, as_json, trusted, resume, force=force)


def _run(
    job: "Recipe",
    out: Path | None,
    as_json: bool,
    trusted: "Trusted",
    resume: bool = False,
    cache: bool = True,
    force: bool = False,
) -> None:
    from llmq.runs.folder import fresh

    folder = (out or Path("runs") / job.name) if resume else fresh(out, job.name)
    if resume and (folder / "recipe.yaml").is_file():
        stopping.resumable = folder  # from before anything heavy is imported
    report = api.run(job, out=folder, resume=resume, cache=cache, force=force, **trusted)
    _show(report, folder, as_json)
    judging.end(report, as_json)


def _show(report: "Report", folder: Path, as_json: bool) -> None:
    from llmq.report import screen

    if as_json:
        typer.echo(in_json((folder / "report.json").read_text(encoding="utf-8")), nl=False)
    else:
        screen.show(report)
        typer.echo(visible(f"\nreport: {folder / 'report.html'}  (also report.md, report.json)"))
        last = folder / str(report.stages[-1]["folder"])
        if (last / "artifact.json").is_file():
            kind = "causal-lm" if "causal_lm" in str(report.recipe.get("model")) else ""
            typer.echo(visible(f"model:  {last}  ({_opened_by(last, kind)})"))


def _opened_by(stage: Path, kind: str) -> str:
    """The command that uses a stage."""
    return f"llmq {'chat' if kind == 'causal-lm' else 'predict'} {shlex.quote(str(stage))}"


COMMANDS: Mapping[str, Callable[..., object]] = {
    "run": run,
    "finetune": finetune,
    "quantize": quantize,
    "search": search,
    "eval": evaluate,
    "export": export,
    "predict": using.predict,
    "chat": using.chat,
    "push": using.push,
    "compare": compare,
    "gate": judging.gate,
    "verify": judging.verify,
    "replay": replay,
    "check": planning.check,
    "list": looking.list_words,
    "show": looking.show,
    "runs": looking.list_runs,
    "doctor": looking.doctor,
    "plan": planning.plan,
    "sweep": sweeping.sweep,
    "copy": planning.copy,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.command("help", hidden=True)
def help_of(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[COMMAND|WORD|RECIPE|…]", autocompletion=completing.shown)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the options of a command, or what `llmq show` shows."""
    program = context.find_root()
    if name is None:
        typer.echo(program.get_help())
    elif name in COMMANDS:
        program.command.main([name, "--help"], program.info_name, standalone_mode=False)
    else:
        looking.show(name, as_json)


def main() -> None:
    """Run the command line; every error, and every signal, ends as one line and an exit code."""
    with stopping.handled():
        code = _main()
        if code == 130:  # typer returns 130 for Ctrl-C
            raise KeyboardInterrupt
    sys.exit(code)


@cache
def command_line() -> Callable[..., int | None]:
    """All commands with their options, made once a process."""
    return typer.main.get_command(app)


def _main() -> int:
    if sys.__stderr__:  # native code that crashes prints the Python stack
        faulthandler.enable(sys.__stderr__, all_threads=False)
    # The trust, and the resumable run, of an earlier command in this process do not hold for this one.
    trust.given()
    stopping.resumable = None
    streams.prepare()
    line, answered = "", False
    try:
        code = command_line()(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except errors.LlmqError as error:
        line, code, answered = str(error), error.exit_code, isinstance(error, errors.Answered)
    except TyperException as error:
        line, code = f"{error.format_message()} (llmq --help lists the commands)", 2
    except SystemExit as stop:  # typer exits with 1 on a closed pipe, and 1 is the code of a failed gate
        line, code = (errors.REASONS[errno.EPIPE], 4) if stop.code == 1 else ("", int(stop.code or 0))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # one line, and never the code of a failed gate; Rust's panics too
        line, code = failed(error)
    if line and "--json" in sys.argv and not answered:
        with suppress(OSError, ValueError, AttributeError):
            print(to_json({"error": line, "exit_code": code}), flush=True)
    tell(line)
    return int(code or 0)

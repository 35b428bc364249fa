"""The command line: words in, one call, an exit code out."""

import errno
import faulthandler
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from llmq import cli_judging, faults, stopping, trust
from llmq.files import to_json
from llmq.harmless import in_json, visible

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.report import Report

app = typer.Typer(
    help="Make models small and prove what it cost.\n\nExit codes: 0 done, 2 wrong input, 4 the job failed. "
    "Of a gate: 1 failed, 3 undecided; of verify and replay: 1 differs.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[WORD.KEY=VALUE]...", help="adapt.lora.r=32, seed=1")]
TaskOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TASK.KEY=VALUE]...", help="perplexity.limit=32, accuracy.data=photos/"),
]
Out = Annotated[Path | None, typer.Option(help="Folder to write; a fresh one under runs/ if unset.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with data on standard output.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Use what an earlier run measured on the same model.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python that the folder of a model or of tasks brings; nothing else does."
    ),
]
AllowCode = Annotated[bool, typer.Option(help="Let tasks run the code that the model writes.")]
DEFAULT_MODEL = "causal_lm"


@app.command()
def run(
    recipe: str,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option(help="Go on after the last whole stage.")] = False,
    cache: Cache = True,
    trust_remote_code: Trust = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Run a whole recipe: a bundled name such as text/quickstart, or a YAML file."""
    from llmq import recipe as recipes

    trust.given(trust_remote_code, allow_code)
    job = recipes.load(recipe, overrides or ())
    _run(job, out, resume, as_json, cache)


@app.command()
def finetune(
    model: str,
    data: str,
    overrides: Overrides = None,
    bits: Annotated[int, typer.Option(help="4 or 8 to quantize the base first (QLoRA), 16 not to.")] = 4,
    merge: Annotated[bool, typer.Option(help="Fold the adapter into the weights at the end.")] = False,
    columns: Annotated[str | None, typer.Option(help="Our columns and DATA's: prompt=query,completion=reply")] = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL, fine-tune it on DATA with LoRA, measure every stage: QLoRA in one command."""
    trust.given(trust_remote_code)
    if bits not in (4, 8, 16):
        raise _user_error(f"--bits {bits}: 4, 8 or 16")
    from llmq.overrides import with_columns

    told = with_columns(data, columns)
    quantize_step = [{"quantize.bnb": {"bits": bits}}] if bits != 16 else []
    steps: list[Any] = [*quantize_step, {"adapt.lora": {"data": told}}, *(["adapt.merge"] if merge else [])]
    evaluate = [
        "size",
        {"perplexity": {"limit": 64}},  # on what adapt.lora trains on, its columns named or not
        {"perplexity": {"data": "pydoc", "limit": 16}},
        "speed",
    ]
    plain = {"model": {DEFAULT_MODEL: {"weights": model}}, "steps": steps, "evaluate": evaluate, "seed": 0}
    _run_built(plain, "finetune", overrides, out, as_json)


@app.command()
def quantize(
    model: str,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option(help="A word of quantize: bnb, gptq, int8, …")] = "bnb",
    bits: Annotated[int | None, typer.Option(help="The method's own default if unset.")] = None,
    family: Annotated[str, typer.Option("--model", help="How to open MODEL: a word of models.")] = DEFAULT_MODEL,
    suite: Annotated[str | None, typer.Option(help="A suite in evals/; the family's own if unset.")] = None,
    out: Out = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL by one method and measure what it cost."""
    from llmq import plugin

    trust.given(trust_remote_code)
    opener: Any = plugin.load(f"models.{family}")
    plain = {
        "model": {family: {"weights": model}},
        "steps": [{f"quantize.{method}": {} if bits is None else {"bits": bits}}],
        "evaluate": suite or opener.suite,
        "seed": 0,
    }
    _run_built(plain, f"quantize-{method}", overrides, out, as_json)


@app.command(name="eval")
def evaluate(
    target: str,
    overrides: TaskOverrides = None,
    suite: Annotated[str | None, typer.Option(help="A suite in evals/, or a YAML file.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead: hellaswag,arc_easy")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task at most, with --tasks.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Copies of data sets: DIR/owner/name/*.parquet, *.jsonl")
    ] = None,
    allow_code: AllowCode = False,
    trust_remote_code: Trust = False,
    batch_size: Annotated[str, typer.Option(help="Texts at once, with --tasks; changes no score.")] = "auto",
    model: Annotated[
        str, typer.Option(help="How to open a target that is no stage: a word of models.")
    ] = DEFAULT_MODEL,
    device: str = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    out: Out = None,
    cache: Cache = True,
    as_json: Json = False,
) -> None:
    """Measure a model (hub id, folder, built-in word), one stage of a run, or all stages of a run.

    Tasks that name no data read what the run of the stage read.
    """
    from llmq import environment, pipeline, plugin, run_folder, run_recipe
    from llmq.targets import asked_for, stages_of
    from llmq.types import Context

    trust.given(trust_remote_code, allow_code)
    asked = asked_for(suite, tasks, limit, data_dir, allow_code, batch_size)
    open_stages, chosen = stages_of(target, model, asked, overrides or ())
    folder = _fresh(out, f"eval-{Path(target).name}")
    if run_folder.holds(folder):  # what it holds would be taken for answers of this target
        raise _user_error(f"{str(folder)!r} is not empty; use a new --out")
    context = Context(environment.prepare(device, 0, threads), 0)
    artifacts = {name: bring(context) for name, bring in open_stages.items()}
    told = {"target": target, "evaluate": [plugin.entry(task) for task in chosen]}
    made_by = run_recipe.of(target)
    steps = made_by.steps if made_by else ()
    report = pipeline.evaluate(artifacts, chosen, folder, context, told, cache, steps)
    _show(report, folder, as_json)
    cli_judging.end(report, as_json)


for judging in (cli_judging.compare, cli_judging.gate, cli_judging.verify, cli_judging.replay):
    app.command()(judging)


@app.command()
def check(
    recipe: str,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Read all data, too, and see that it fits the base.")] = False,
    trust_remote_code: Trust = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Check a recipe without running it, and name what each of its steps and tasks reads.

    With --data, do all that a run does before its first step: read the data, bring the base, see that they fit.
    """
    from llmq import reading, run_recipe, support
    from llmq import recipe as recipes
    from llmq.source import to_yaml

    trust.given(trust_remote_code, allow_code)
    job = recipes.load(recipe, overrides or ())
    if data:
        from llmq import environment, pipeline
        from llmq.types import Context

        pipeline.bring(job, Context(environment.prepare(job.device, job.seed, job.threads), job.seed))
    typer.echo(to_json(job.plain()) if as_json else _as_seen(to_yaml(job.plain())), nl=as_json)
    if not as_json:
        made_by = run_recipe.of_weights(job.model)
        for line in reading.told(job.steps, job.evaluate, made_by.steps if made_by else ()):
            typer.echo(visible(f"# {line}"))
        for line in reading.counted([*job.steps, *job.evaluate]) if data else ():
            typer.echo(visible(f"# {line}"))
        for line in support.foretold(job.model, [*job.steps, *job.evaluate]):
            typer.echo(visible(f"# {line}"))
        typer.echo(visible(f"# {recipe}: {len(job.steps)} steps, {len(job.evaluate)} tasks; ready to run"), err=True)


@app.command(name="list")
def list_words(as_json: Json = False) -> None:
    """List every word, recipe and suite."""
    from llmq import listing

    found = listing.everything()
    typer.echo(to_json(found) if as_json else listing.as_text(found))


@app.command()
def show(word: str, as_json: Json = False) -> None:
    """Show the settings of a word (quantize.bnb), or a recipe (text/quickstart)."""
    from llmq import listing, plugin
    from llmq import recipe as recipes

    if "/" in word:
        typer.echo(_as_seen(recipes.find("recipes", word).read_text(encoding="utf-8")), nl=False)
        return
    cls = plugin.load(word)
    typer.echo(to_json(cls.model_json_schema()) if as_json else listing.settings_of(word, cls))


@app.command(name="copy")
def copy_recipe(recipe: str, folder: Path) -> None:
    """Copy a bundled recipe into FOLDER, to be changed."""
    from llmq import recipe as recipes

    source = recipes.find("recipes", recipe)
    target = folder / source.name
    _folder_or_nothing(folder)
    if target.exists():
        raise _user_error(f"{str(target)!r} exists; move it away first")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(visible(f"{target}: run it with: llmq run {target}"))


def _run_built(plain: dict[str, Any], name: str, overrides: list[str] | None, out: Path | None, as_json: bool) -> None:
    from llmq import recipe as recipes
    from llmq.overrides import in_order
    from llmq.source import Source, to_yaml

    source = Source("command line", plain)
    for override in in_order(overrides or ()):
        recipes.apply_override(source, override)
    job = recipes.parse(source, name)
    typer.echo(visible(to_yaml(job.plain())), err=True)
    _run(job, out, False, as_json)


def _run(job: "Recipe", out: Path | None, resume: bool, as_json: bool, cache: bool = True) -> None:
    folder = (out or Path("runs") / job.name) if resume else _fresh(out, job.name)
    if resume and (folder / "recipe.yaml").is_file():
        stopping.resumable = folder  # from before anything heavy is imported
    from llmq import pipeline

    report = pipeline.run(job, folder, resume, cache)
    if report:
        _show(report, folder, as_json)
        cli_judging.end(report, as_json)


def _fresh(out: Path | None, name: str) -> Path:
    """`out`, or the first of runs/name, runs/name-2, … that is not there."""
    if out:
        _folder_or_nothing(out)
        return out
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _show(report: "Report", folder: Path, as_json: bool) -> None:
    from llmq.report import screen

    if as_json:
        typer.echo(in_json((folder / "report.json").read_text(encoding="utf-8")), nl=False)
    else:
        screen.show(report)
        typer.echo(visible(f"\nreport: {folder / 'report.html'}  (also report.md, report.json)"))


def _as_seen(text: str) -> str:
    """A file's text as it is, for another file; on a terminal nothing of it moves the cursor."""
    return visible(text) if sys.stdout.isatty() else text


def _folder_or_nothing(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise _user_error(f"{str(path)!r} is a file; name a folder")


def _user_error(message: str) -> Exception:
    from llmq.errors import UserError

    return UserError(message)


def main() -> None:
    """Every error that llmq expects becomes one line and an exit code, and so does a signal."""
    with stopping.handled():
        code = _main()
        if code == 130:  # typer's way to say that Ctrl-C was pressed
            raise KeyboardInterrupt
    sys.exit(code)


def _main() -> int:
    from llmq.errors import LlmqError

    if sys.__stderr__:  # native code that dies here says where it was called
        faulthandler.enable(sys.__stderr__, all_threads=False)
    # What an earlier command in this process trusted is not trusted by this one, nor is its run resumed by it.
    trust.given()
    stopping.resumable = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII alone gets the rest as escapes
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    line = ""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if sys.stdout:  # none where it was closed before
            sys.stdout.flush()
    except LlmqError as error:
        line, code = str(error), error.exit_code
    except TyperException as error:
        line, code = f"{error.format_message()} (llmq --help shows what is known)", 2
    except SystemExit as stop:  # typer's way to say that nobody reads on: (1), which is a failed gate's
        line, code = (faults.REASONS[errno.EPIPE], 4) if stop.code == 1 else ("", int(stop.code or 0))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # one line, and never the code of a failed gate; Rust's panics too
        line, code = failed(error)
    tell(line)
    return int(code or 0)


def failed(error: BaseException) -> tuple[str, int]:
    """What is not ours: one line, with the file that holds the traceback, and the code to end with."""
    from llmq import terminal
    from llmq.files import cache

    code, line = faults.exit_code(error), faults.line_of(error)
    if code == 4 and not faults.is_stream(error):
        with suppress(OSError, RuntimeError):
            place = cache("log.txt")
            if not terminal.kept_traceback(error):
                place.parent.mkdir(parents=True, exist_ok=True)
                terminal.keep_traceback(error, place)
        kept = terminal.kept_traceback(error)
        line += f" (traceback: {kept})" if kept else ""
    return line, code


def tell(line: str) -> None:
    """Print the last line where it can be printed; streams that are full or closed are not flushed again."""
    from llmq.errors import brief

    with suppress(OSError, ValueError, AttributeError):
        if line:
            print(f"llmq: {brief(line)}", file=sys.stderr, flush=True)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)

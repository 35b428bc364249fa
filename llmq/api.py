"""The verbs of llmq in Python; the command line says the same ones.

Every verb raises `UserError` for wrong input and `LlmqError` for a job that failed, each in one line. Folders are made
as on the command line: under `runs/`, unless `out` names one. Code that a folder brings runs only with
`trust_remote_code=True`, code that a model writes only with `allow_code=True`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import trust
from llmq.errors import UserError
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.artifact import Artifact
    from llmq.judge.comparisons import Comparisons
    from llmq.judge.gate import Gate
    from llmq.planning import Plan
    from llmq.predicting import Predictions
    from llmq.recipe import Recipe
    from llmq.report import Report
    from llmq.searching.images import ImageSearched
    from llmq.searching.text import Searched
    from llmq.sweeping.points import Swept
    from llmq.targets import Bring
    from llmq.types import Loaded

__all__ = [
    "compare", "evaluate", "export", "finetune", "gate", "open", "plan", "predict", "push", "quantize", "run", "search",
    "sweep",
]  # fmt: skip

Target = str | os.PathLike[str]
Overrides = Mapping[str, object] | Iterable[str]
"""`{"adapt.lora.r": 32}`, or `["adapt.lora.r=32"]` as on the command line."""
FAMILY = "causal_lm"


def run(
    recipe: "Target | JsonObject | Recipe",
    overrides: Overrides = (),
    *,
    out: Target | None = None,
    resume: bool = False,
    cache: bool = True,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> "Report":
    """Run a whole recipe: a bundled name, a YAML file, a mapping, or a `Recipe`.

    What this machine has no room for is refused before anything is loaded, unless `force` goes on. `resume` goes on
    after the last whole stage in `out`; `cache` uses what an earlier run measured on the same model. Of several
    processes that a launcher started only the first returns; the others end with `SystemExit`.
    """
    from llmq import pipeline, planning, processes
    from llmq.runs.folder import fresh

    job = load(recipe, overrides, trust_remote_code=trust_remote_code, allow_code=allow_code)
    shared = [part.in_every_process for parts in (job.steps, job.evaluate) for part in parts]
    processes.check(any(shared))
    folder = Path(out or Path("runs") / job.name) if resume else fresh(out, job.name)
    pipeline.check_folder(job, folder, resume)
    pipeline.prepare(job)
    foretold = planning.before_run(job, folder, force)
    report = pipeline.run(job, folder, resume, cache, foretold)
    if report is None:
        raise SystemExit(0)
    return report


def load(
    recipe: "Target | JsonObject | Recipe",
    overrides: Overrides = (),
    *,
    name: str = "recipe",
    said_in: str = "recipe",
    checked: bool = True,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> "Recipe":
    """A checked recipe, from all that `run` takes; `name` is that of a mapping.

    `said_in` is the place that errors about a mapping name. Unless `checked`, weights and data may be missing.
    """
    from llmq import recipe as recipes
    from llmq.overrides import in_order

    trust.given(trust_remote_code, allow_code)
    changes = in_order(overrides)
    if isinstance(recipe, recipes.Recipe):
        if not changes:
            return recipe
        name, recipe = recipe.name, recipe.plain()
    if not isinstance(recipe, Mapping):
        return recipes.load(os.fspath(recipe), changes, checked=checked)
    return recipes.of_source(recipes.Source(said_in, dict(recipe)), name, changes, checked=checked)


def plan(
    recipe: "Target | JsonObject | Recipe",
    overrides: Overrides = (),
    *,
    out: Target | None = None,
    trust_remote_code: bool = False,
) -> "Plan":
    """Foretell a run from configuration alone: sizes, memory and time of each stage, and what this machine has not.

    Takes all that `run` takes; neither weights nor data need be there. Two seconds measure the machine.
    """
    from llmq import planning

    job = load(recipe, overrides, checked=False, trust_remote_code=trust_remote_code)
    return planning.plan(job, Path(out) if out else None)


def finetune(
    model: Target,
    data: Target,
    overrides: Overrides = (),
    *,
    bits: int = 4,
    merge: bool = False,
    export: str | None = None,
    columns: str | None = None,
    suite: str | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: Target | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> "Report":
    """Quantize a language model to `bits`, fine-tune it on data with LoRA, measure every stage (QLoRA).

    `bits=16` leaves it unquantized. `merge` folds the adapter into the weights, and `export` writes the merged model in
    the format of another engine: `gguf`. Size, held-out perplexity and speed are measured, unless `suite` or `tasks`
    (lm-eval's, `limit` questions each at most) ask for something else.
    """
    plain = finetuning(model, data, bits, merge, export, columns, asked_of(suite, tasks, limit), seed)
    job = load(plain, overrides, name="finetune", trust_remote_code=trust_remote_code)
    return run(job, out=out, force=force, trust_remote_code=trust_remote_code)


def finetuning(
    model: Target,
    data: Target,
    bits: int,
    merge: bool,
    export: str | None,
    columns: str | None,
    asked: Any = None,
    seed: int = 0,
) -> JsonObject:
    """The recipe of `finetune`."""
    if bits not in (4, 8, 16):
        raise UserError(f"bits {bits}: 4, 8 or 16")
    from llmq.overrides import with_columns

    steps: list[Any] = [{"quantize.bnb": {"bits": bits}}] if bits != 16 else []
    steps += [{"adapt.lora": {"data": with_columns(os.fspath(data), columns)}}]
    steps += ["adapt.merge"] if merge or export else []
    steps += [f"export.{export}"] if export else []
    usual = [
        "size",
        {"perplexity": {"limit": 64}},  # on the training data of adapt.lora
        {"perplexity": {"data": "pydoc", "limit": 16}},
        "speed",
    ]
    return {"model": {FAMILY: {"weights": os.fspath(model)}}, "steps": steps, "evaluate": asked or usual, "seed": seed}


def asked_of(suite: str | None, tasks: str | Sequence[str] | None, limit: int | None) -> Any:
    """The `evaluate` entry that a suite, or tasks of lm-eval, stand for; None without either."""
    from llmq.targets import asked_for

    named = tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks)
    return asked_for(suite, named, limit) if suite or tasks or limit is not None else None


def quantize(
    model: Target,
    overrides: Overrides = (),
    *,
    method: str = "bnb",
    bits: int | None = None,
    family: str = FAMILY,
    suite: str | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: Target | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> "Report":
    """Quantize a model by one method and measure what it cost; `family` is the word of models that opens it."""
    job = load(
        quantizing(model, method, bits, family, asked_of(suite, tasks, limit), seed),
        overrides,
        name=f"quantize-{method}",
        trust_remote_code=trust_remote_code,
    )
    return run(job, out=out, force=force, trust_remote_code=trust_remote_code)


def quantizing(
    model: Target, method: str, bits: int | None, family: str, asked: Any = None, seed: int = 0
) -> JsonObject:
    """The recipe of `quantize`."""
    from llmq import plugin

    opener: Any = plugin.load(f"models.{family}")
    return {
        "model": {family: {"weights": os.fspath(model)}},
        "steps": [{f"quantize.{method}": {} if bits is None else {"bits": bits}}],
        "evaluate": asked or opener.suite,
        "seed": seed,
    }


def search(
    model: Target,
    overrides: Overrides = (),
    *,
    size: str | None = None,
    bits: float | None = None,
    kl: float | None = None,
    perplexity: str | None = None,
    macs: str | None = None,
    top1: str | None = None,
    map: str | None = None,
    psnr: str | None = None,
    methods: Sequence[str] = ("gptq",),
    data: Target = "pydoc",
    samples: int = 64,
    length: int = 512,
    sym: bool = False,
    dtype: str | None = None,
    suite: str | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Target | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> "Searched | ImageSearched":
    """Find bits and groups for each layer within a budget, write the recipe, run and measure it.

    The budget is one of `size` (`"0.40x"` of the base, `"100MB"`), `bits` a quantized weight, scales included, `kl`,
    the divergence from the base in nats a token, or `perplexity` (`"1.05x"` of the base's). Each of the `methods`
    (`gptq`, `awq`, `prune.layers`) is run, and the best as measured is returned. `data` is what is calibrated on; `sym`
    keeps the zero in the middle of the grids, for kernels that read no others. The foretold costs are kept in the
    cache, and serve every budget.

    Of a stage of an image model the budget is `macs` (`"0.5x"` of the base's multiplications: channels layer by layer,
    taught by the base), or drops at most: `top1` (`"0.3pt"`), `map` (`"0.01"`), `psnr` (dB): int8, layers in float.
    """
    from llmq import processes
    from llmq.overrides import in_order
    from llmq.runs.folder import fresh, named
    from llmq.searching import budget, images, text

    processes.check_alone("a search")
    trust.given(trust_remote_code)
    folder = named(Path(out or Path("runs") / "search")) if resume else fresh(out, "search")
    data, changes = os.fspath(data), in_order(overrides)

    def run_in(job: "Recipe", place: Path = folder) -> "Report":
        goes_on = resume and (place == folder or place.is_dir())  # a kill came before most of the runs
        return run(job, out=place, resume=goes_on, trust_remote_code=trust_remote_code)

    of_images = {k: v for k, v in {"macs": macs, "top1": top1, "map": map, "psnr": psnr}.items() if v is not None}
    if of_images:
        of_text = {"size": size, "bits": bits, "kl": kl, "perplexity": perplexity, "dtype": dtype, "sym": sym or None}
        of_text |= {"length": length if length != 512 else None, "methods": None if tuple(methods) == ("gptq",) else 1}
        if odd := [name for name, value in of_text.items() if value is not None]:
            raise UserError(f"--{odd[0]} is of language models, and --{next(iter(of_images))} of image models")
        if data == "pydoc":
            raise UserError("a search of an image model needs --data, such as what it was trained on")
        stage = images.stage_of(os.fspath(model))
        of_stage = images.ImageSearch(run_in, stage, data, samples, suite, seed, changes, device)
        return of_stage.within(of_images)
    wanted = budget.Budget(size, bits, kl, perplexity)
    opened = {"weights": os.fspath(model)} | ({"dtype": dtype} if dtype else {})
    settings = {"sym": sym, "data": data, "samples": samples, "length": length}
    tasks = suite or text.TASKS
    job = text.Search(run_in, {FAMILY: opened}, wanted, settings, tasks, seed, folder, changes, device)
    return job.best(methods)


def sweep(
    file: Target, *, out: Target | None = None, ray: str | None = None, trust_remote_code: bool = False
) -> "Swept":
    """Run a recipe under many settings, as a bundled sweep or a YAML file says: a grid, a list, or Optuna's TPE.

    Each run is a process of its own; finished ones are skipped, failed ones tried once more. Runs that begin with the
    same base and steps make those once. Returns the runs with their figures, the Pareto front and the best. `ray` is
    the address of a Ray cluster whose machines run them side by side, or `local`.
    """
    from llmq import processes, sweeping
    from llmq.sweeping.spec import load

    processes.check_alone("a sweep")
    trust.given(trust_remote_code)
    asked, folder = load(Path(file)), Path(out or Path("runs") / Path(file).stem)
    return sweeping.on_cluster(asked, folder, ray) if ray else sweeping.sweep(asked, folder)


def evaluate(
    target: Target,
    overrides: Overrides = (),
    *,
    suite: str | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    data: Target | None = None,
    data_dir: Target | None = None,
    include_path: Target | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int | str = "auto",
    dtype: str | None = None,
    family: str = FAMILY,
    device: str = "auto",
    threads: int | None = None,
    out: Target | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> "Report":
    """Measure a model (hub id, folder, file, built-in word), one stage of a run, or all stages of a run.

    `suite` names a suite in `evals/` or a YAML file; `tasks` are lm-eval's instead, `limit` questions each at most.
    Tasks that name no data read what the run of the stage read, or `data`. `family` and `dtype` open a target that is
    no stage. Of several processes that a launcher started only the first returns.
    """
    from llmq import pipeline, plugin, processes, together
    from llmq import recipe as recipes
    from llmq.overrides import in_order
    from llmq.runs.folder import fresh, holds
    from llmq.targets import asked_for, stages_of

    trust.given(trust_remote_code, allow_code)
    named = tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks)
    folders = {"data": data, "data_dir": data_dir, "include_path": include_path}
    settings: JsonObject = {key: os.fspath(value) for key, value in folders.items() if value is not None}
    settings |= {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template, "allow_code": allow_code}
    asked = asked_for(suite, named, limit, str(batch_size), **settings)
    place = os.fspath(target)
    changes = [*in_order(overrides), *([f"model.dtype={dtype}"] if dtype else [])]
    open_stages, chosen = stages_of(place, family, asked, changes)
    processes.check(any(task.in_every_process for task in chosen))
    folder = fresh(out, f"eval-{Path(place).name}")
    if processes.is_first() and holds(folder):  # its files would be taken for answers about this target
        raise UserError(f"{str(folder)!r} is not empty; use a new --out")
    context = _context(device, threads)
    with processes.first_does(context.device):
        artifacts = {name: bring(context) for name, bring in open_stages.items()}
    told = {"target": place, "evaluate": [plugin.entry(task) for task in chosen]}
    made_by = recipes.of_run(place)
    if not processes.is_first():
        together.follow(context.device)
        raise SystemExit(0)
    return pipeline.evaluate(artifacts, chosen, folder, context, told, cache, made_by.steps if made_by else ())


def compare(
    *targets: Target,
    family: str = FAMILY,
    device: str | None = None,
    out: Target | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
) -> "Comparisons":
    """Set runs, stages, models or lm-eval's `results_*.json` beside the first: differences, intervals, verdicts.

    A model of which nothing was measured, such as a `.gguf` file, is measured now, by the tasks of the first run and
    together with all that is compared, in a new folder; `family`, `device`, `out` and `cache` are about that.
    """
    from llmq.judge import comparisons
    from llmq.targets import is_model

    trust.given(trust_remote_code)
    names = [os.fspath(target) for target in targets]
    if len(names) > 1 and any(map(is_model, names)):
        names = _measured(names, family, device, out, cache)
    return comparisons.side_by_side(comparisons.targets(names))


def _measured(targets: Sequence[str], family: str, device: str | None, out: Target | None, cache: bool) -> list[str]:
    """The folders of the stages that a new evaluation makes of runs, stages and models."""
    from llmq import pipeline, plugin
    from llmq.judge import results
    from llmq.runs.folder import fresh, holds
    from llmq.targets import is_model, unmeasured
    from llmq.terminal import say

    for target in targets:
        if not is_model(target):
            results.read(target)  # a missing or broken one is reported before a model is opened
    asked = unmeasured(targets, family)
    job = asked.job
    folder = fresh(out, "compare")
    if holds(folder):
        raise UserError(f"{str(folder)!r} is not empty; use a new --out")
    context = _context(device or (job.device if job else "auto"), job.threads if job else None, job.seed if job else 0)
    artifacts = {name: bring(context) for name, bring in asked.stages.items()}
    told = {"targets": list(targets), "evaluate": [plugin.entry(task) for task in asked.tasks]}
    pipeline.evaluate(artifacts, asked.tasks, folder, context, told, cache, job.steps if job else ())
    say(f"measured together, with the base: {folder / 'report.html'}")
    return [str(folder / name) for name in asked.compared]


def gate(run: Target, *rules: str, stage: str | None = None) -> "Gate":
    """Judge a stage of a run, the last if unset, by rules such as `"perplexity <= 1.03x base"`."""
    from llmq.judge import gate as gates

    return gates.Gate(gates.of_run(os.fspath(run), rules, stage))


def export(
    stage: Target,
    to: str,
    overrides: Overrides = (),
    *,
    family: str = FAMILY,
    device: str = "auto",
    out: Target | None = None,
    trust_remote_code: bool = False,
) -> "Artifact":
    """Write a stage, or any model, in the format of another engine; an adapter is merged first.

    `to` is a word of export. Returns the new stage, a folder with the files and `artifact.json`.
    """
    from llmq import pipeline
    from llmq.runs.folder import fresh
    from llmq.targets import exporting

    trust.given(trust_remote_code)
    step = exporting(to, overrides)
    name, bring = _one_stage(stage, family)
    folder = fresh(out, f"{name}-{to}")
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists; use a new --out")
    context = _context(device)
    return pipeline.export(bring(context), step, folder, context)


def predict(
    stage: Target,
    inputs: Target | Iterable[Target] = (),
    *,
    out: Target | None = None,
    skip_bad: bool = False,
    family: str = FAMILY,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    **options: Any,
) -> "Predictions":
    """Use a stage, the last stage of a run, or any model on files, and on those in folders; all is in a new folder.

    The options are those of the command, by the kind of the model: `beside`, `window`, `threshold`, `count`, `prompts`,
    `max_new_tokens`, `temperature`, `top_p`, `system`, `raw`. A bad file is an error, or is left out by `skip_bad`.
    """
    from llmq import predicting
    from llmq.runs.folder import fresh
    from llmq.targets import last_stage

    trust.given(trust_remote_code)
    name, bring = last_stage(os.fspath(stage), family)
    folder = fresh(out, f"predict-{name}")
    paths = [os.fspath(p) for p in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    context = _context(device, seed=seed)
    return predicting.predict(bring(context), paths, folder, options, context, skip_bad)


def push(stage: Target, repository: str, *, private: bool = False) -> str:
    """Upload a stage with its model card to a repository of the hub, made if need be; returns the address.

    The token is that of `hf auth login`, or `HF_TOKEN`. What llmq writes beside a model stays here.
    """
    from llmq.publishing import publish

    return publish(Path(stage), repository, private)


@contextmanager
def open(
    stage: Target, *, family: str = FAMILY, device: str = "auto", trust_remote_code: bool = False
) -> "Iterator[Loaded[Any]]":
    """Open a stage, or any model: `with llmq.open(stage) as loaded` has `loaded.module` and `loaded.processor`.

    The module is ready for inference; the processor is a tokenizer, or the transform of an image. The memory is freed
    when the block ends.
    """
    trust.given(trust_remote_code)
    _, bring = _one_stage(stage, family)
    context = _context(device)
    with bring(context).open(context.device) as loaded:
        yield loaded


def _one_stage(target: Target, family: str) -> "tuple[str, Bring]":
    """The name of a stage, and the function that brings it. Raises `UserError` for a run of several stages."""
    from llmq.targets import stages_of

    stages, _ = stages_of(os.fspath(target), family, [])
    if len(stages) > 1:
        raise UserError(f"{os.fspath(target)!r} is a run of several stages; name one: {', '.join(stages)}")
    ((name, bring),) = stages.items()
    return name, bring


def _context(device: str, threads: int | None = None, seed: int = 0) -> "Any":
    from llmq import environment
    from llmq.types import Context

    return Context(environment.prepare(device, seed, threads), seed)

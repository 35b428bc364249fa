"""The targets of `llmq eval`: a model, a stage, or all stages of a run."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llmq import plugin, recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.overrides import fold, in_order
from llmq.recipe import Recipe, suite_tasks
from llmq.runs import paths as run_paths
from llmq.source import Source, find, read
from llmq.types import Context, JsonObject, Model, Step, Task

Bring = Callable[[Context], Artifact]


def stages_of(
    target: str, model: str, asked: Any, changes: Iterable[str] = ()
) -> tuple[dict[str, Bring], Sequence[Task]]:
    """A function that brings each stage of `target`, and the tasks asked for, checked to suit it.

    Tasks about a run or a stage read the data of the run's recipe, unless they, or the `changes`, name other data.
    """
    artifacts, job = _artifacts(Path(target)), recipe.of_run(target)
    source = Source("command line", {"model": {model: {"weights": target}}, "evaluate": asked})
    for change in in_order(changes):
        if artifacts and change.startswith("model."):
            raise UserError(f"override {change!r}: {target!r} is a stage, and artifact.json names its family")
        fold(source, change, ())
    if not artifacts:
        opener = _opener(*plugin.name_and_settings(source.data["model"]))
        return {"0-base": opener.base}, suite_tasks(source.data["evaluate"], source, opener.kind)
    kind = next(iter(artifacts.values())).model.kind
    before = (job.steps, job.evaluate) if job else ()
    try:
        tasks = suite_tasks(source.data["evaluate"], source, kind, *before)
    except UserError as error:
        raise UserError(f"{error}{recipe.lost(job)}") from None
    return {name: _ready(a) for name, a in artifacts.items()}, tasks


def last_stage(target: str, family: str) -> tuple[str, Bring]:
    """The name of a stage, or of the last one of a run, and the function that brings it."""
    stages, _ = stages_of(target, family, [])
    return list(stages.items())[-1]


@dataclass(frozen=True)
class Unmeasured:
    """What is compared, where models of it are still to be measured: all of it, together."""

    stages: dict[str, Bring]
    """The base, and the stage or model of each target in order."""
    tasks: Sequence[Task]
    job: Recipe | None
    """The recipe of the run that says the tasks; without one the first model is the base."""

    @property
    def compared(self) -> list[str]:
        """The names of the targets' stages, in order."""
        return list(self.stages)[1 if self.job else 0 :]


def is_model(target: str) -> bool:
    """True for a `.gguf` file, and for a folder with a model of which nothing was measured."""
    path = Path(target)
    if not path.is_dir():
        return path.suffix == ".gguf" and path.is_file()
    made = any((path / name).is_file() for name in ("config.json", "artifact.json"))
    return made and not (path / "measurements.json").is_file() and not any(path.rglob("results_*.json"))


def unmeasured(targets: Sequence[str], family: str) -> Unmeasured:
    """The last stages of runs and the models among `targets`, to be measured by the tasks of the first run.

    Models are opened as the base of that run was. Without a run the suite of the family is asked.
    """
    run = next((target for target in targets if not is_model(target)), "")
    job = recipe.of_run(run) if run else None
    if run and not job:
        bare = next(filter(is_model, targets))
        raise UserError(
            f"{bare!r} is a model, and {run!r} no run of a recipe, by whose tasks to measure it; name such a run or "
            f"a stage of one, or measure the model first (llmq eval {bare} --out NAME), and compare NAME"
        )
    settings: JsonObject = plugin.to_plain(job.model) if job else {}
    settings.pop("revision", None)
    word = job.model.word.removeprefix("models.") if job else family
    stages: dict[str, Bring] = {}
    if job:
        home = Path(run) if recipe.is_run(Path(run)) else Path(run).resolve().parent
        stages["0-base"] = _ready(next(iter(_artifacts(home).values())))
    for target in targets:
        name = re.sub(r"[^\w.]+", "-", re.sub(r"^\d+-", "", Path(target).resolve().name.removesuffix(".gguf")))
        artifacts = list(_artifacts(Path(target)).values())
        model = artifacts[-1].model if artifacts else _opener(word, {**settings, "weights": target})
        stages[f"{len(stages)}-{name}"] = _ready(artifacts[-1]) if artifacts else model.base
    tasks = job.evaluate if job else suite_tasks(model.suite, Source("command line", {}), model.kind)
    return Unmeasured(stages, tasks, job)


def _opener(word: str, settings: JsonObject) -> Model:
    """The model that a word of models opens, checked."""
    made: Any = recipe.part(Source("command line", {}), ("model",), {word: settings}, "models")
    made.check()
    return cast("Model", made)


def exporting(to: str, changes: Iterable[str]) -> Step:
    """The step that writes the format `to`, with settings from `KEY=VALUE`."""
    source = Source("command line", {"steps": [{f"export.{to}": {}}]})
    for change in in_order(changes):
        fold(source, f"export.{to}.{change}", ())
    step: Step = recipe.part(source, ("steps", 0), source.data["steps"][0], None)
    step.check()
    return step


def _artifacts(folder: Path) -> dict[str, Artifact]:
    """The stage in a folder, or the stages of a run from the baseline on."""
    is_stage = (folder / "artifact.json").is_file()
    if is_stage or recipe.is_run(folder):
        home = folder.resolve().parent
        run_paths.check(home if is_stage and (home / "recipe.yaml").is_file() else folder)
    if is_stage:
        return {folder.resolve().name: _load(folder)}
    if not recipe.is_run(folder):
        return {}
    stages = [f.parent for f in folder.glob("*/artifact.json") if f.parent.name.split("-")[0].isdecimal()]
    found = sorted(stages, key=lambda f: int(f.name.split("-")[0]))
    if not found:
        raise UserError(f"{str(folder)!r} is a run without a whole stage")
    said = read(folder / "recipe.yaml").data
    baseline = said.get("baseline") if isinstance(said, dict) else None
    # Stages before the baseline are networks yet to be trained.
    first = next((i for i, f in enumerate(found) if baseline in (f.name, f.name.partition("-")[2])), 0)
    return {f.name: _load(f) for f in found[first:]}


def _load(folder: Path) -> Artifact:
    try:
        artifact = Artifact.load(folder)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{str(folder / 'artifact.json')!r} does not describe a stage; run its recipe again") from None
    artifact.model.check_trust()
    for held in filter(None, (artifact.weights, artifact.adapter)):
        if not held.exists():
            raise UserError(f"{str(folder)!r} is made of {str(held)!r}, and there is no such folder")
    return artifact


def _ready(artifact: Artifact) -> Bring:
    return lambda context: artifact


def asked_for(
    suite: str | None, tasks: str | None, limit: int | None = None, batch_size: str = "auto", **settings: Any
) -> Any:
    """The `evaluate` entry that the options of a command stand for: the name of a suite, or a list of tasks.

    `settings` go to every task that has a setting of that name, unless they are empty.
    """
    if limit is not None and not tasks:
        raise UserError(f"--limit {limit} goes with --tasks a,b,c; a suite says its own limits")
    if suite and tasks:
        raise UserError(f"--suite {suite} and --tasks {tasks} exclude each other; leave one out")
    if not suite and not tasks:
        raise UserError("nothing is asked: name --suite NAME (llmq list evals), or lm-eval's --tasks a,b,c")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) and tasks):
        raise UserError(f"--batch-size {batch_size}: a whole number, with --tasks, or 'auto'")
    said = {key: value for key, value in settings.items() if value is not None and value is not False}
    if suite:
        return _with(read(find("evals", suite)).data, said) if said else suite
    said |= {"limit": limit} if limit is not None else {}
    said |= {"batch_size": int(batch_size)} if batch_size != "auto" else {}
    return [{"lm_eval": {"tasks": [t.strip() for t in (tasks or "").split(",") if t.strip()], **said}}]


def _with(entries: object, said: JsonObject) -> object:
    """The entries of a suite, with each option given to the tasks that have such a setting."""
    if not isinstance(entries, list):
        return entries
    told = []
    for entry in entries:
        word, settings = plugin.name_and_settings(entry)
        known = plugin.load(f"tasks.{word}").model_fields
        mine = {k: v for k, v in said.items() if k in known}
        told.append({word: {**settings, **mine}} if mine else entry)
    if told == entries:
        raise UserError(f"--{min(said).replace('_', '-')}: no task of this suite has such a setting")
    return told

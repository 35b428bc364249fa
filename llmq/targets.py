"""What `llmq eval` can be pointed at."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmq import plugin, run_paths, run_recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.overrides import fold, in_order
from llmq.recipe import suite_tasks
from llmq.source import Source, find, read
from llmq.types import Context, Task

Bring = Callable[[Context], Artifact]


def stages_of(
    target: str, model: str, asked: Any, changes: Iterable[str] = ()
) -> tuple[dict[str, Bring], Sequence[Task]]:
    """How to bring each stage that `target` means, and the tasks asked for, checked to suit it.

    Of a run or its stage they read what the run's recipe read, unless they, or the `changes`, say otherwise.
    """
    artifacts, job = _artifacts(Path(target)), run_recipe.of(target)
    source = Source("command line", {"model": {model: {"weights": target}}, "evaluate": asked})
    for change in in_order(changes):
        if artifacts and change.startswith("model."):
            raise UserError(f"override {change!r}: {target!r} is a stage, and says itself how it is opened")
        fold(source, change, ())
    if not artifacts:
        opener: Any = plugin.build(source.data["model"], "models")
        opener.check()
        return {"0-base": opener.base}, suite_tasks(source.data["evaluate"], source, opener.kind)
    kind = next(iter(artifacts.values())).model.kind
    before = (job.steps, job.evaluate) if job else ()
    try:
        tasks = suite_tasks(source.data["evaluate"], source, kind, *before)
    except UserError as error:
        raise UserError(f"{error}{run_recipe.lost(job)}") from None
    return {name: _ready(a) for name, a in artifacts.items()}, tasks


def _artifacts(folder: Path) -> dict[str, Artifact]:
    """The stage in a folder, or the stages of the run in it, from the one on that the others are set beside."""
    is_stage = (folder / "artifact.json").is_file()
    if is_stage or run_recipe.is_run(folder):
        home = folder.resolve().parent
        run_paths.check(home if is_stage and (home / "recipe.yaml").is_file() else folder)
    if is_stage:
        return {folder.resolve().name: _load(folder)}
    if not run_recipe.is_run(folder):
        return {}
    stages = [f.parent for f in folder.glob("*/artifact.json") if f.parent.name.split("-")[0].isdecimal()]
    found = sorted(stages, key=lambda f: int(f.name.split("-")[0]))
    if not found:
        raise UserError(f"{str(folder)!r} is a run without a whole stage")
    said = read(folder / "recipe.yaml").data
    baseline = said.get("baseline") if isinstance(said, dict) else None
    # Stages before the one that the others are set beside are nets yet to be trained.
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
    suite: str | None, tasks: str | None, limit: int | None, data_dir: Path | None, allow_code: bool, batch_size: str
) -> Any:
    """What `llmq eval` was asked to measure: the name of a suite, or tasks with what was said of them folded in."""
    if bool(suite) == bool(tasks):
        raise UserError("eval needs either --suite NAME or --tasks a,b,c")
    if limit and not tasks:
        raise UserError(f"--limit {limit} goes with --tasks; a suite says its own limits")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) and tasks):
        raise UserError(f"--batch-size {batch_size}: a whole number, with --tasks, or 'auto'")
    said: dict[str, Any] = {"data_dir": str(data_dir)} if data_dir else {}
    said |= {"allow_code": True} if allow_code else {}
    if suite:
        return _with(read(find("evals", suite)).data, said) if said else suite
    said |= {"limit": limit} if limit else {}
    said |= {"batch_size": int(batch_size)} if batch_size != "auto" else {}
    return [{"lm_eval": {"tasks": [t.strip() for t in (tasks or "").split(",") if t.strip()], **said}}]


def _with(entries: Any, said: dict[str, Any]) -> Any:
    """The entries of a suite, what was said given to those that know it."""
    if not isinstance(entries, list):
        return entries
    told = []
    for entry in entries:
        word, settings = plugin.name_and_settings(entry)
        known = plugin.load(f"tasks.{word}").model_fields
        mine = {k: v for k, v in said.items() if k in known}
        told.append({word: {**settings, **mine}} if mine else entry)
    if told == entries:
        raise UserError(f"--{min(said).replace('_', '-')}: no task of this suite reads what it names")
    return told

"""What `llmq eval` can be pointed at."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmq import plugin
from llmq.errors import UserError
from llmq.recipe import find, suite_tasks
from llmq.source import Source, read
from llmq.types import Artifact, Context, Task

Bring = Callable[[Context], Artifact]


def stages_of(target: str, model: str, asked: Any) -> tuple[dict[str, Bring], Sequence[Task]]:
    """How to bring each stage that `target` means, and the tasks asked for, checked to suit it."""
    folder = Path(target)
    source = Source("command line", {})
    if (folder / "artifact.json").is_file():
        artifacts = {folder.resolve().name: _load(folder)}
    elif (folder / "recipe.yaml").is_file():
        stages = [f.parent for f in folder.glob("*/artifact.json") if f.parent.name.split("-")[0].isdecimal()]
        found = sorted(stages, key=lambda f: int(f.name.split("-")[0]))
        if not found:
            raise UserError(f"{target!r} is a run without a whole stage")
        baseline = yaml.safe_load((folder / "recipe.yaml").read_text()).get("baseline")
        # Stages before the one that the others are set beside are nets yet to be trained.
        first = next((i for i, f in enumerate(found) if baseline in (f.name, f.name.partition("-")[2])), 0)
        artifacts = {f.name: _load(f) for f in found[first:]}
    else:
        opener: Any = plugin.build({model: {"weights": target}}, "models")
        opener.check()
        return {"0-base": opener.base}, suite_tasks(asked, source, opener.kind)
    kind = next(iter(artifacts.values())).model.kind
    return {name: _ready(a) for name, a in artifacts.items()}, suite_tasks(asked, source, kind)


def _load(folder: Path) -> Artifact:
    try:
        artifact = Artifact.load(folder)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'artifact.json'}:{error.lineno}: not JSON: {error.msg.lower()}") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{str(folder / 'artifact.json')!r} does not describe a stage; run its recipe again") from None
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

"""What `llmq eval` can be pointed at."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmq import plugin
from llmq.errors import UserError
from llmq.recipe import suite_tasks
from llmq.source import Source
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

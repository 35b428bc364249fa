"""The recipe of a run that is there already: whoever goes on from one of its stages reads what it read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import plugin
from llmq.errors import UserError
from llmq.files import at_home
from llmq.guarded import json_files
from llmq.source import read
from llmq.types import Model

if TYPE_CHECKING:
    from llmq.recipe import Recipe

PATHS = ("path", "images", "held_out", "partner", "include_path", "data_dir", "inception", "weights", "data", "text")
"""Settings that can name a file or folder."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: other tools leave a `recipe.yaml` of their own beside a model's configuration."""
    return (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()


def of(target: str) -> "Recipe | None":
    """The recipe of the run that `target` is, or is a stage of; None where there is none beside it.

    Relative paths in it are meant from the folder that the run was called in, which its report keeps.
    """
    from llmq.recipe import built

    folder = Path(target)
    is_stage = (folder / "artifact.json").is_file()
    home = folder.resolve().parent if is_stage else folder
    if not (is_run(folder) or (is_stage and (home / "recipe.yaml").is_file())):
        return None
    source = read(home / "recipe.yaml")
    source.data = _settled(source.data, _called_from(home))
    return built(source, home.name)


def of_weights(model: Model) -> "Recipe | None":
    """The recipe of the run whose stage a model's weights are."""
    weights = str(getattr(model, "weights", None) or "")
    folder = at_home(weights)
    return of(str(folder)) if weights and (folder / "artifact.json").is_file() else None


def lost(job: "Recipe | None") -> str:
    """What to do where data that the run read is gone."""
    from llmq.reading import called, data_of, is_here

    read = [data for part in (*job.steps, *job.evaluate) for data in data_of(part)] if job else []
    gone = [called(data) for data in read if not is_here(data)]
    cure = "call it from where that lies, or name other data, such as perplexity.data=pydoc"
    return f"; the run read {gone[0]}: {cure}" if gone else ""


def _called_from(home: Path) -> list[Path]:
    """The folder that a run was called in: where it was, and where it is if it was moved together with the run."""
    try:
        about = json_files.read_object(home / "report.json")["environment"]
        folder, run = str(about["called_from"]), str(about["run"])
    except (UserError, KeyError, TypeError):  # of before this was kept, or not whole
        return []
    return [Path(folder), Path(os.path.normpath(home.resolve() / os.path.relpath(folder, run)))]


def _settled(value: Any, folders: Sequence[Path], key: str = "") -> Any:
    """Plain data with each relative path to what lies in one of the folders made absolute."""
    if isinstance(value, dict):
        return {k: _settled(v, folders, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_settled(v, folders, key) for v in value]
    if not (isinstance(value, str) and value and key in PATHS) or f"data.{value}" in plugin.words():
        return value
    there = Path.is_file if key == "held_out" else Path.exists  # or the word `test` would mean a folder of that name
    return next((str(folder / value) for folder in folders if there(folder / value)), value)

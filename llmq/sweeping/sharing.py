"""Stages that two runs of a sweep have in common are made once, and linked.

A hash for each stage tells everything that decides its files.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import answers, environment, partials, reading, trust
from llmq.artifact import MACHINE
from llmq.files import CARD, at_home, sha256_text, write_json, write_text
from llmq.guarded.files import read_json_object
from llmq.source import to_yaml
from llmq.sweeping.points import Point
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe


ANSWERS = ("measurements.json", "clocks.json", "samples", "pictures", "lm_eval", CARD)
"""What tasks leave in a stage: another run may ask other tasks, and the cache knows answers to the same ones."""


def made_by(recipe: "Recipe") -> JsonObject:
    """What decides the figures of a run besides its recipe, by the words for it."""
    return {
        "weights": _stamp(str(getattr(recipe.model, "weights", ""))),
        "data": reading.hashes([*recipe.steps, *recipe.evaluate]),
        "libraries": {name: environment.library_version(name) for name in environment.LIBRARIES},
        "code of llmq": answers.own_code(),
        "trust": trust.told(),
    }


def beginnings(recipe: "Recipe") -> list[str]:
    """A hash for each stage, of everything that decides its files: weights, steps, data, code, libraries, seed."""
    fixed = {
        "model": answers.settings(recipe.model),
        "weights": _stamp(str(getattr(recipe.model, "weights", ""))),
        "run": [recipe.seed, recipe.device, recipe.threads],
        "libraries": {name: environment.library_version(name) for name in environment.LIBRARIES},
        "llmq": answers.own_code(),
        "trusted": trust.told(),
    }
    made = []
    for count in range(len(recipe.steps) + 1):
        steps = recipe.steps[:count]
        data = reading.hashes(steps)
        told = {**fixed, "steps": [answers.settings(step) for step in steps], "data": data}
        made.append(sha256_text(json.dumps(told, sort_keys=True, default=str)))
    return made


def _stamp(weights: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of weights that lie here; of a hub id nothing, as its cache is not changed."""
    place = at_home(weights)
    files = sorted(place.glob("*")) if weights and place.is_dir() else [place] if place.is_file() else []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def share_beginning(point: Point, others: Sequence[Point]) -> tuple[str, ...]:
    """Link the stages that another run made by the same beginning into the folder of a new one; their names.

    A run keeps the beginnings that it had when it began: its data or llmq may have changed since.
    """
    point.hashes = beginnings(point.recipe)
    write_json(_beginnings_file(point), {"beginnings": point.hashes, "made_by": made_by(point.recipe)})
    for each in others:
        noted = kept(each, "beginnings")
        each.hashes = each.hashes or (noted if isinstance(noted, list) else ())
    best = max(others, key=partial(common, point), default=None)
    if best is None or common(point, best) < 2:  # a base alone is brought as quickly
        return ()
    names = point.recipe.stage_names[: common(point, best)]
    point.folder.mkdir(exist_ok=True)
    write_text(point.folder / "recipe.yaml", to_yaml(point.recipe.plain()))  # first: a killed sweep goes on from there
    for name in names:
        _link(best.folder / name, point.folder / name)
    return tuple(names)


def _beginnings_file(point: Point) -> Path:
    return point.folder.with_name(f"{point.name}.json")


def kept(point: Point, what: str) -> object:
    """What was noted of a point when it began; None if nothing was."""
    file = _beginnings_file(point)
    return read_json_object(file).get(what) if file.is_file() else None


def common(one: Point, other: Point) -> int:
    """The number of stages that two runs have in common; a hash is of all steps before, so that they come first."""
    return sum(a == b for a, b in zip(one.hashes, other.hashes, strict=False))


def _link(source: Path, target: Path) -> None:
    """Make a stage of the files of another without a second copy of the weights, and without its answers."""

    def unasked(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in ANSWERS and Path(folder) == source]

    with partials.partial_of(target, folder=True) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, ignore=unasked, dirs_exist_ok=True)
        if (file := partial / MACHINE).is_file():
            told = read_json_object(file)
            file.unlink()  # or the file of the other run would change
            write_json(file, {k: v for k, v in told.items() if k != "asked"})


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)

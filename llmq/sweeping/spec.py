"""A sweep as its YAML says it, and the recipes of its runs."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from llmq import recipe as recipes
from llmq import types
from llmq.errors import UserError, explain
from llmq.files import sha256_text
from llmq.rules import read_rule
from llmq.source import find, read, to_flow
from llmq.sweeping.points import Settings
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe


class Range(types.Settings):
    """The numbers between which a search looks: whole ones between whole numbers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low}, high {self.high}: low is at most high, and above 0 with log")
        return self


class Sweep(types.Settings):
    """A sweep as its YAML says it: one of `grid`, `list` and `search`."""

    recipe: str | JsonObject
    """A bundled recipe, a file, or the recipe itself."""
    name: str = ""
    """The name in the picture; that of the recipe, or of the file of a sweep that has its recipe in it, if unset."""
    overrides: dict[str, object] = {}
    """Settings of every run."""
    grid: dict[str, list[object]] = {}
    list: tuple[dict[str, object], ...] = ()
    search: dict[str, Range | Annotated[tuple[object, ...], Field(min_length=1)]] = {}
    """What Optuna's TPE may choose: one of some values, or a number of a range."""
    trials: PositiveInt = 20
    objectives: tuple[str, ...] = Field(("token_perplexity", "bytes_on_disk"), min_length=1)
    """Figures of the last stage; their directions are those of the figures."""
    gate: tuple[str, ...] = ()
    """Rules on the last stage; the best run is the first by the first objective among those that pass."""
    seed: int = Field(0, ge=0, lt=2**32)


def load(name: str | Path) -> Sweep:
    """The sweep in a YAML file, or a bundled one. Raises `UserError` with the place and the cure."""
    file = find("sweeps", str(name))
    source = read(file)
    try:
        sweep = Sweep.model_validate(source.data if isinstance(source.data, dict) else {})
    except ValidationError as error:
        first = error.errors()[0]["loc"][:1]
        same = [e for e in error.errors() if e["loc"][:1] == first]
        raise UserError(f"{source.where(first)}: {explain(same, Sweep)}") from None
    if sum(map(bool, (sweep.grid, sweep.list, sweep.search))) != 1:
        raise UserError(f"{source.name}: a sweep has one of 'grid', 'list' and 'search'")
    for rule in sweep.gate:
        read_rule(rule)
    if not isinstance(sweep.recipe, str):
        return sweep.model_copy(update={"name": sweep.name or file.stem})
    beside = file.parent / sweep.recipe  # a path starts at the sweep's own folder
    return sweep.model_copy(update={"recipe": str(beside)}) if beside.is_file() else sweep


def settings_of(asked: Sweep) -> Iterator[Settings]:
    """The settings of each run of a grid or a list, those for every run with them."""
    if asked.grid:
        for values in product(*asked.grid.values()):
            yield {**asked.overrides, **dict(zip(asked.grid, values, strict=True))}
    for entry in asked.list:
        yield {**asked.overrides, **entry}


def recipe_of(asked: Sweep, settings: Settings, *, checked: bool = True) -> "Recipe":
    """The recipe of a sweep under some settings. Raises `UserError` for settings that it does not take."""
    from llmq.overrides import in_order

    if isinstance(asked.recipe, str):
        return recipes.load(asked.recipe, in_order(settings), checked=checked)
    source = recipes.Source(f"the recipe of {asked.name}", deepcopy(asked.recipe))
    return recipes.of_source(source, asked.name, in_order(settings), checked=checked)


def name_of(settings: Settings) -> str:
    """The name of a run: the last part of each key with the value, and a hash that tells runs of one name apart."""
    parts = (f"{key.rpartition('.')[2]}-{to_flow(value)}" for key, value in settings.items())
    told = re.sub(r"[^\w.-]+", "-", "_".join(parts)).strip("-.")[:60]
    return f"{told or 'run'}-{sha256_text(json.dumps(dict(settings), sort_keys=True, default=str))[:6]}"

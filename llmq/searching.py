"""The best quantization within a budget: bits and groups layer by layer, written as a recipe, run and measured.

The cost of each layer on each grid is foretold once (`text.sensitivity`), and kept in the cache for every other budget.
An integer program takes the grids that cost least. The recipe is an ordinary one, to be edited and run again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import environment, plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError, in_bytes
from llmq.terminal import say
from llmq.types import Context

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.report import Report
    from llmq.text.family import LanguageModel
    from llmq.text.grids import Grid
    from llmq.text.sensitivity import Table

TASKS = ["size", {"perplexity": {"limit": 32}}, {"divergence": {"tasks": []}}]
"""The tasks of a search: the bytes of the budget, and the divergence that was foretold, among others."""
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Found:
    """A choice for each layer, with the bytes and the divergence that are foretold of it."""

    grids: Mapping[str, "Grid | None"]
    bytes: int
    kl: float


def budget_bytes(size: str, base: "Artifact[LanguageModel]") -> int:
    """The bytes that `0.40x` (of the base), `100MB` or `95MiB` stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(x|[kmg]i?b)?", size.strip().lower())
    if not match or float(match[1]) <= 0:
        raise UserError(f"--size {size!r}: a share of the base such as 0.40x, or bytes such as 100MB")
    number, unit = float(match[1]), match[2] or ""
    return int(number * (base.bytes_on_disk if unit == "x" else UNITS[unit]))


def within_bytes(table: "Table", budget: int) -> Found:
    """The choice that costs least within a number of bytes. Raises `UserError` for fewer than any choice has."""
    from llmq.matrix.allotment import allot

    taken = allot([*table.costs.values()], [*table.sizes.values()], budget - table.rest)
    if taken is None:
        raise UserError(
            f"the smallest stage has {in_bytes(table.least)}, of which {in_bytes(table.rest)} lie outside of what can "
            f"be quantized, and the budget is {in_bytes(budget)}"
        )
    return _found(table, taken)


def within_kl(table: "Table", kl: float) -> Found:
    """The choice with the fewest bytes whose foretold divergence from the base is `kl` at most."""
    from llmq.matrix.allotment import allot

    taken = allot([*table.sizes.values()], [*table.costs.values()], kl)
    assert taken is not None  # float weights cost nothing
    return _found(table, taken)


def _found(table: "Table", taken: Sequence[int]) -> Found:
    choices = dict(zip(table.grids, taken, strict=True))
    return Found(
        {name: table.grids[name][i] for name, i in choices.items()},
        table.rest + sum(table.sizes[name][i] for name, i in choices.items()),
        sum(table.costs[name][i] for name, i in choices.items()),
    )


def modules_of(found: Found, default: "Grid") -> dict[str, Any]:
    """The `modules` of a recipe: one pattern for each kind of layer and grid, with the numbers of its blocks."""
    numbers: dict[tuple[str, Any], list[str]] = {}
    everywhere: dict[str, int] = {}
    for name, grid in found.grids.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        number, kind = (match[1], match[2]) if match else ("", name)
        everywhere[kind] = everywhere.get(kind, 0) + 1
        numbers.setdefault((kind, grid), []).append(number)
    modules: dict[str, Any] = {}
    for (kind, grid), its in numbers.items():
        if grid != default:
            some = its[0] if len(its) == 1 else f"({'|'.join(its)})"
            blocks = "" if len(its) == everywhere[kind] else rf"\.{some}\."
            settings = "skip" if grid is None else {"bits": grid.bits, "group_size": grid.group_size}
            modules[f"{blocks}{re.escape(kind)}$"] = settings
    return modules


def recipe_of(found: Found, model: Mapping[str, Any], settings: Mapping[str, Any], tasks: Any, seed: int) -> Any:
    """The recipe of a choice, as data."""
    from collections import Counter

    grids = [grid for grid in found.grids.values() if grid is not None]
    if not grids:
        raise UserError("the budget is met by the untouched weights; nothing is to be quantized")
    default = Counter(grids).most_common(1)[0][0]
    grid = {"bits": default.bits, "group_size": default.group_size}
    step = {"quantize.gptq": {**grid, **settings, "modules": modules_of(found, default)}}
    return {"model": dict(model), "steps": [step], "evaluate": tasks, "seed": seed}


TRIES = 3
"""Runs at most for a budget of quality: each aims lower, by what the one before measured."""


@dataclass(frozen=True)
class Budget:
    """The demand of a search: bytes on disk at most, bits a quantized weight at most, or a divergence at most."""

    size: str | None = None
    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("size", "bits", "kl") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"{' and '.join(f'--{name}' for name in given) or 'no budget'}: name one of --size, --bits, --kl"
            )
        if any(value is not None and not value > 0 for value in (self.bits, self.kl)):
            raise UserError(f"--{given[0]} {getattr(self, given[0])}: a number above 0")

    def bytes(self, table: "Table", base: "Artifact[LanguageModel]") -> int | None:
        """The bytes of the stage at most; None for a budget of quality."""
        if self.bits is not None:
            return table.rest + int(self.bits * table.weights / 8)
        return budget_bytes(self.size, base) if self.size is not None else None


@dataclass(frozen=True)
class Searched:
    """A search at its end: the report of the last run, the choice that was run, the budget in bytes if it was one."""

    report: "Report"
    found: Found
    budget: int | None
    kl: float | None

    @property
    def told(self) -> dict[str, float | int | None]:
        """What was foretold, beside what was measured of the last stage."""
        last = self.report.stages[-1]["name"]
        values = {m["metric"]: m for m in self.report.measurements if m["stage"] == last}
        kl = values["kl_to_base"]
        return {
            "budget_bytes": self.budget,
            "foretold_bytes": self.found.bytes,
            "bytes_on_disk": values["bytes_on_disk"]["value"],
            "foretold_kl": self.found.kl,
            "kl_to_base": kl["value"],
            "kl_upper": kl["value"] + 1.96 * (kl["stderr"] or 0.0),
        }

    @property
    def line(self) -> str:
        """The same in words."""
        told = self.told
        limit = "" if self.budget is None else f", budget {self.budget}"
        met = "" if self.kl is None else f"; upper end of the interval {told['kl_upper']:.4f}, asked for {self.kl}"
        sizes = f"bytes {told['bytes_on_disk']:.0f} (foretold {told['foretold_bytes']}{limit})"
        return f"{sizes}, KL {told['kl_to_base']:.4f} (foretold {told['foretold_kl']:.4f}){met}"


def search(
    run: Callable[["Recipe", Path], "Report"],
    model: Mapping[str, Any],
    budget: Budget,
    settings: Mapping[str, Any],
    tasks: Any,
    seed: int,
    out: Path,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Searched:
    """Find the choice within a budget, `run` its recipe in `out`, and compare.

    A budget of quality is met if the upper end of the interval (95 %) of the measured divergence is; else it is tried
    again with a lower aim, in `out-2` and `out-3`. Raises `LlmqError` for a stage larger than its budget.
    """
    from llmq import recipe as recipes

    context = Context(environment.prepare(device, seed, None), seed)
    opener: Any = plugin.build(dict(model), "models")
    base = opener.base(context)
    step: Any = plugin.build({"quantize.gptq": dict(settings)})
    step.check()
    table = step.foretold(base, context)
    limit, aim = budget.bytes(table, base), budget.kl or 0.0
    for attempt in range(1, TRIES + 1):
        found = within_kl(table, aim) if limit is None else within_bytes(table, limit)
        say(f"search: {in_bytes(found.bytes)} foretold, KL {found.kl:.4f} nats a token")
        source = recipes.Source("search", recipe_of(found, model, settings, tasks, seed))
        recipes.check_shape(source)
        for override in overrides:
            recipes.apply_override(source, override)
        folder = out if attempt == 1 else out.with_name(f"{out.name}-{attempt}")
        done = Searched(run(recipes.parse(source, "search"), folder), found, limit, budget.kl)
        size, upper = done.told["bytes_on_disk"], done.told["kl_upper"]
        if limit is not None and size is not None and size > limit:
            raise LlmqError(f"the stage has {size} bytes, and its budget was {limit}; say so to the makers of llmq")
        if budget.kl is None or upper is None or upper <= budget.kl:
            return done
        aim *= 0.95 * budget.kl / upper
    return done

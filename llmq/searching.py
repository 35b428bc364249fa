"""The best quantization within a budget: bits and groups layer by layer, written as a recipe, run and measured.

The cost of each layer on each grid is foretold once (`text.sensitivity`), and kept in the cache for every other budget.
An integer program takes the grids that cost least. The recipe is an ordinary one, to be edited and run again. Where
several methods are named, each spends the budget in a run of its own, and the best as measured is kept.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import environment, partials, plugin
from llmq.budget import Budget
from llmq.errors import LlmqError, UserError, did_you_mean, in_bytes
from llmq.terminal import say
from llmq.types import Context, JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.report import Report
    from llmq.text.grids import Grid
    from llmq.text.sensitivity import Table

TASKS = ["size", {"perplexity": {"limit": 32}}, {"divergence": {"tasks": []}}]
"""The tasks of a search: the bytes of the budget, and the divergence that was foretold, among others."""


@dataclass(frozen=True)
class Found:
    """A choice for each layer, with the bytes and the divergence that are foretold of it."""

    grids: Mapping[str, "Grid | None"]
    bytes: int
    kl: float


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


def modules_of(found: Found, default: "Grid") -> JsonObject:
    """The `modules` of a recipe: one pattern for each kind of layer and grid, with the numbers of its blocks."""
    numbers: dict[tuple[str, Grid | None], list[str]] = {}
    everywhere: dict[str, int] = {}
    for name, grid in found.grids.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        number, kind = (match[1], match[2]) if match else ("", name)
        everywhere[kind] = everywhere.get(kind, 0) + 1
        numbers.setdefault((kind, grid), []).append(number)
    modules: JsonObject = {}
    for (kind, grid), its in numbers.items():
        if grid != default:
            some = its[0] if len(its) == 1 else f"({'|'.join(its)})"
            blocks = "" if len(its) == everywhere[kind] else rf"\.{some}\."
            settings = "skip" if grid is None else {"bits": grid.bits, "group_size": grid.group_size}
            modules[f"{blocks}{re.escape(kind)}$"] = settings
    return modules


def step_of(found: Found, settings: JsonObject, rounding: str = "quantize.gptq") -> JsonObject:
    """The step of a choice, as data."""
    from collections import Counter

    grids = [grid for grid in found.grids.values() if grid is not None]
    if not grids:
        raise UserError("the budget is met by the untouched weights; nothing is to be quantized")
    default = Counter(grids).most_common(1)[0][0]
    grid = {"bits": default.bits, "group_size": default.group_size}
    return {rounding: {**grid, **settings, "modules": modules_of(found, default)}}


@dataclass(frozen=True)
class Method:
    """A way to spend a budget: the blocks that go before, the word that rounds, and its settings."""

    rounding: str
    settings: Mapping[str, object]
    drop: int = 0


SETTINGS: Mapping[str, object] = {"hessian": "loss", "sweeps": 2}
"""The settings of GPTQ that are best by measurement at any bits."""
METHODS: Mapping[str, Method] = {
    "gptq": Method("quantize.gptq", SETTINGS),
    "awq": Method("quantize.awq", {"hessian": "loss", "solver": "gptq"}),
    "prune.layers": Method("quantize.gptq", SETTINGS, drop=1),
}
"""The methods of a search. `prune.layers` drops one block, and another one for as long as that is better."""
PICTURE = "search.svg"
"""The file of the picture in the folder of the run."""
TRIES = 3
"""Runs at most for a budget of quality: each aims lower, by what the one before measured."""


@dataclass(frozen=True)
class Searched:
    """A search at its end: the report of the last run, the choice that was run, the budget, and its bytes."""

    report: "Report"
    found: Found
    budget: Budget
    limit: int | None

    @property
    def told(self) -> dict[str, float | int | bool | None]:
        """What was foretold, and what was measured of the last stage, with the upper ends of 95 % intervals."""
        from llmq.statistics.resampling import t_quantile

        last = self.report.stages[-1]["name"]
        values = {m["metric"]: m for m in self.report.measurements if m["stage"] == last}
        beside = {c["metric"]: c for c in self.report.comparisons if c["stage"] == last}
        if lost := [name for name in ("bytes_on_disk", "kl_to_base") if name not in values]:
            raise LlmqError(f"{last} has no {' and no '.join(lost)}; {self.report.folder / 'report.md'} says why")
        kl, perplexity = values["kl_to_base"], beside.get("token_perplexity", {})
        spread = None if kl["stderr"] is None or kl["n"] < 2 else t_quantile(0.975, kl["n"] - 1) * kl["stderr"]
        return {
            "budget_bytes": self.limit,
            "foretold_bytes": self.found.bytes,
            "bytes_on_disk": values["bytes_on_disk"]["value"],
            "foretold_kl": self.found.kl,
            "kl_to_base": kl["value"],
            "kl_upper": None if spread is None else kl["value"] + spread,
            "perplexity_ratio": perplexity.get("ratio"),
            "perplexity_ratio_upper": (perplexity.get("ratio_ci95") or (None, None))[1],
        }

    @property
    def upper(self) -> float | None:
        """The upper end of the interval of what the budget limits, in nats a token; None where nothing tells it."""
        told = self.told
        if self.budget.perplexity is None:
            return told["kl_upper"]
        ratio = told["perplexity_ratio_upper"]
        return None if ratio is None else log(ratio)

    @property
    def met(self) -> bool:
        """True if the bytes, or the upper end of the interval of the quality asked for, lie within the budget."""
        nats, upper = self.budget.nats, self.upper
        return nats is None or (upper is not None and upper <= nats)

    @property
    def code(self) -> int:
        """The exit code: 0 for a budget that is met, else 1."""
        return 0 if self.met else 1

    @property
    def order(self) -> tuple[bool, float]:
        """The less, the better: within the budget, then the divergence within bytes, or the bytes within a quality."""
        told = self.told["kl_to_base" if self.budget.nats is None else "bytes_on_disk"]
        return not self.met, inf if told is None else told

    @property
    def picture(self) -> Path:
        """The picture of the search, in the folder of the run."""
        return self.report.folder / PICTURE

    @property
    def line(self) -> str:
        """The same in words."""
        told = self.told
        limit = "" if self.limit is None else f", budget {self.limit}"
        sizes = f"bytes {told['bytes_on_disk']:.0f} (foretold {told['foretold_bytes']}{limit})"
        measured = f"KL {told['kl_to_base']:.4f} (foretold {told['foretold_kl']:.4f})"
        return f"{sizes}, {measured}{self._asked(told)}"

    def _asked(self, told: Mapping[str, float | int | None]) -> str:
        if self.budget.nats is None:
            return ""
        name, unit = ("kl_upper", "") if self.budget.perplexity is None else ("perplexity_ratio_upper", "x")
        upper = "unknown" if told[name] is None else f"{told[name]:.4f}{unit}"
        asked = self.budget.perplexity or self.budget.kl
        return f"; upper end of the interval {upper}, asked for {asked}: {'met' if self.met else 'MISSED'}"


POINTS = 12
"""Sizes of the front in the picture."""


def front_of(table: "Table") -> list[tuple[int, float]]:
    """Bytes and foretold divergence of the best choices, from the smallest stage to one with hardly a loss."""
    least, most = table.least, table.rest + sum(max(its[:-1]) for its in table.sizes.values())
    budgets = [least + (most - least) * i // (POINTS - 1) for i in range(POINTS)]
    return [(found.bytes, found.kl) for found in (within_bytes(table, budget) for budget in budgets)]


def _write_picture(done: Searched, table: "Table") -> None:
    from llmq.report import searched

    told, grids = done.told, done.found.grids
    bits = {name: None if grid is None else float(grid.bits) for name, grid in grids.items()}
    measured = told["bytes_on_disk"] or 0.0, told["kl_to_base"] or 0.0
    picture = searched.draw(front_of(table), (done.found.bytes, done.found.kl), measured, bits)
    done.picture.write_text(picture, encoding="utf-8")


@dataclass(frozen=True)
class Search:
    """What all methods of a search share. `run` runs a recipe in a folder; `settings` are those of the calibration."""

    run: Callable[["Recipe", Path], "Report"]
    model: JsonObject
    budget: Budget
    settings: JsonObject
    tasks: object
    seed: int
    out: Path
    overrides: Sequence[str] = ()
    device: str = "auto"

    def best(self, methods: Sequence[str]) -> Searched:
        """The best of all methods, by measured divergence within bytes, or by bytes within a quality.

        Raises `UserError` for an unknown method.
        """
        for name in methods:
            if name not in METHODS:
                raise UserError(f"--methods {name!r}: some of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
        self._recipe([{"quantize.gptq": dict(self.settings)}], ())  # wrong settings are told before hours of work
        best: Searched | None = None
        for name in dict.fromkeys(methods):
            method, better = METHODS[name], True
            while better:
                called = f"{name}-{method.drop}" if method.drop else name
                done = self.spend(method, self.out if best is None else self.out.with_name(f"{self.out.name}-{called}"))
                if len(methods) > 1:
                    say(f"search: {called}: {done.line}")
                better = best is None or done.order < best.order
                best = done if better else best
                better, method = better and method.drop > 0, replace(method, drop=method.drop + 1)
        assert best is not None
        return best

    def spend(self, method: Method, out: Path) -> Searched:
        """Find the choice of one method within the budget, run its recipe in `out`, and compare.

        A budget of quality is met if the upper end of the measured interval (95 %) is; else it is tried again with a
        lower aim, in `out-2` and `out-3`. Raises `LlmqError` for a stage larger than its budget.
        """
        before, table, limit = self._foretold(method)
        aim = self.budget.nats or 0.0
        for attempt in range(1, TRIES + 1):
            found = within_kl(table, aim) if limit is None else within_bytes(table, limit)
            say(f"search: {in_bytes(found.bytes)} foretold, KL {found.kl:.4f} nats a token")
            steps = [*before, step_of(found, {**self.settings, **method.settings}, method.rounding)]
            folder = out if attempt == 1 else out.with_name(f"{out.name}-{attempt}")
            done = Searched(self.run(self._recipe(steps, self.overrides), folder), found, self.budget, limit)
            size, upper = done.told["bytes_on_disk"], done.upper
            if limit is not None and size is not None and size > limit:
                raise LlmqError(f"the stage has {size} bytes, and its budget was {limit}; say so to the makers of llmq")
            if done.met or upper is None or self.budget.nats is None:
                break
            aim *= 0.95 * self.budget.nats / upper
        _write_picture(done, table)
        return done

    def _foretold(self, method: Method) -> tuple[list[JsonObject], "Table", int | None]:
        """The steps before the rounding, the table of the model that they leave, and the bytes at most."""
        context = Context(environment.prepare(self.device, self.seed, None), self.seed)
        opener: Any = plugin.build(dict(self.model), "models")
        step: Any = plugin.build({"quantize.gptq": {**SETTINGS, **self.settings}})
        step.check()
        base = opener.base(context)
        table = step.foretold(base, context)
        limit = self.budget.bytes(table, base)
        if not method.drop:
            return [], table, limit
        windows = {key: self.settings[key] for key in ("data", "samples", "length") if key in self.settings}
        entry: JsonObject = {"prune.layers": {"drop": method.drop, **windows}}
        dropping: Any = plugin.build(entry)
        dropping.check_base(base)
        with partials.scratch() as folder:
            return [entry], step.foretold(dropping.apply(base, folder, context), context), limit

    def _recipe(self, steps: list[JsonObject], overrides: Sequence[str]) -> "Recipe":
        from llmq import recipe

        plain = {"model": dict(self.model), "steps": steps, "evaluate": self.tasks, "seed": self.seed}
        source = recipe.Source("search", plain)
        recipe.check_shape(source)
        for override in overrides:
            recipe.apply_override(source, override)
        job = recipe.parse(source, "search")
        if lost := {"tasks.size", "tasks.divergence"} - {task.word for task in job.evaluate}:
            raise UserError(f"a search asks {' and '.join(sorted(lost))}, which are not among the tasks that are named")
        return job

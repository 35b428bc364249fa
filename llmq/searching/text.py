"""The best quantization within a budget: bits and groups layer by layer, written as a recipe, run and measured.

The cost of each layer on each grid is foretold once (`text.sensitivity`), and kept in the cache for every other budget.
An integer program takes the grids that cost least. The recipe is an ordinary one, to be edited and run again. Where
several methods are named, each spends the budget in a run of its own, and the best as measured is kept.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmq import environment, partials, plugin
from llmq.errors import LlmqError, UserError, did_you_mean, in_bytes
from llmq.searching.budget import Budget
from llmq.terminal import say
from llmq.types import Context, JsonObject

if TYPE_CHECKING:
    from llmq.artifact import Artifact
    from llmq.recipe import Recipe
    from llmq.report import Report
    from llmq.text.family import LanguageModel
    from llmq.text.grids import Grid
    from llmq.text.sensitivity import Sizes, Table

TASKS = ["size", {"perplexity": {"limit": 32}}, {"divergence": {"tasks": []}}]
"""The tasks of a search: the bytes of the budget, and the divergence that was foretold, among others."""


@dataclass(frozen=True)
class Found:
    """A choice for each layer, with the bytes and the divergence that are foretold of it."""

    grids: Mapping[str, "Grid | None"]
    bytes: int
    kl: float


class Unmet(UserError):
    """A budget that no choice of a method meets."""


def within_bytes(table: "Table", budget: int) -> Found:
    """The choice that costs least within a number of bytes. Raises `Unmet` for fewer than any choice has."""
    from llmq.matrix.allotment import allot

    check_bytes(table, budget)
    taken = allot([*table.costs.values()], [*table.sizes.values()], budget - table.rest)
    assert taken is not None  # the least of each layer fits
    return _found(table, taken)


def check_bytes(sizes: "Sizes", budget: int, dropped: int = 0) -> None:
    """Raise `Unmet` if no choice has so few bytes, after the largest blocks, `dropped` of them, were dropped."""
    least = sizes.least_without(dropped)
    if least > budget:
        after = f" after {dropped} of {len(sizes.blocks)} blocks were dropped" if dropped else ""
        raise Unmet(
            f"the smallest stage{after} has {in_bytes(least)}, and the budget is {in_bytes(budget)}; "
            f"{in_bytes(sizes.rest)} of all lie outside of what can be quantized"
        )


def within_kl(table: "Table", kl: float) -> Found:
    """The choice with the fewest bytes whose foretold divergence from the base is `kl` at most.

    Raises `Unmet` where the model is farther from the base before it is quantized.
    """
    from llmq.matrix.allotment import allot

    if kl <= table.lost:
        raise Unmet(f"what was dropped costs {table.lost:.4f} nats a token already, and {kl:.4f} are left")
    taken = allot([*table.sizes.values()], [*table.costs.values()], kl - table.lost)
    assert taken is not None  # float weights cost nothing
    return _found(table, taken)


def _found(table: "Table", taken: Sequence[int]) -> Found:
    choices = dict(zip(table.grids, taken, strict=True))
    return Found(
        {name: table.grids[name][i] for name, i in choices.items()},
        table.rest + sum(table.sizes[name][i] for name, i in choices.items()),
        table.lost + sum(table.costs[name][i] for name, i in choices.items()),
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
    for (kind, grid), places in numbers.items():
        if grid != default:
            some = places[0] if len(places) == 1 else f"({'|'.join(places)})"
            blocks = "" if len(places) == everywhere[kind] else rf"\.{some}\."
            settings = "skip" if grid is None else {"bits": grid.bits, "group_size": grid.group_size}
            modules[f"{blocks}{re.escape(kind)}$"] = settings
    return modules


def step_of(found: Found, settings: JsonObject, rounding: str = "quantize.gptq") -> JsonObject:
    """The step of a choice, as data."""
    from collections import Counter

    grids = [grid for grid in found.grids.values() if grid is not None]
    if not grids:
        raise Unmet("the budget leaves all weights as they are; nothing is to be quantized")
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
        """What was foretold, and what was measured of the last stage, with the upper ends of 95 % intervals.

        Of several texts the worst counts. None stands for a figure that one of the texts does not have.
        """
        from llmq.statistics.resampling import t_quantile

        last = self.report.stages[-1]["name"]
        sizes, kls = (self._of("measurements", metric, last) for metric in ("bytes_on_disk", "kl_to_base"))
        asked = {m["task"] for m in self.report.measurements if m["metric"] == "kl_to_base"}
        lost = ["bytes_on_disk"] * (not sizes) + ["kl_to_base"] * (not kls or asked != kls.keys())
        if lost:
            raise LlmqError(f"{last} has no {' and no '.join(lost)}; {self.report.folder / 'report.md'} says why")
        beside = self._of("comparisons", "token_perplexity", last)
        # A text on which the stage was not set beside the base has no ratio, and so the budget is not met.
        texts = {m["task"] for m in self.report.measurements if m["metric"] == "token_perplexity"}
        ratios = [beside.get(task, {}) for task in texts]

        def upper(kl: JsonObject) -> float | None:
            if kl["stderr"] is None or kl["n"] < 2:
                return None
            return float(kl["value"] + t_quantile(0.975, kl["n"] - 1) * kl["stderr"])

        return {
            "budget_bytes": self.limit,
            "foretold_bytes": self.found.bytes,
            "bytes_on_disk": next(iter(sizes.values()))["value"],
            "foretold_kl": self.found.kl,
            "kl_to_base": _largest(kl["value"] for kl in kls.values()),
            "kl_upper": _largest(map(upper, kls.values())),
            "perplexity_ratio": _largest(row.get("ratio") for row in ratios),
            "perplexity_ratio_upper": _largest((row.get("ratio_ci95") or (None, None))[1] for row in ratios),
        }

    def _of(self, kind: Literal["measurements", "comparisons"], metric: str, stage: str) -> dict[str, JsonObject]:
        """By task, what a report says of a figure of a stage."""
        rows: Sequence[JsonObject] = getattr(self.report, kind)
        return {row["task"]: row for row in rows if row["stage"] == stage and row["metric"] == metric}

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


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest value; None if any is None, or there is none."""
    every = list(values)
    known = [value for value in every if value is not None]
    return max(known) if known and len(known) == len(every) else None


POINTS = 12
"""Sizes of the front in the picture."""


def front_of(table: "Table") -> list[tuple[int, float]]:
    """Bytes and foretold divergence of the best choices, from the smallest stage to one with hardly a loss."""
    least, most = table.least, table.rest + sum(max(layer_sizes[:-1]) for layer_sizes in table.sizes.values())
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

        Raises `UserError` for an unknown method, and for a budget that none of the methods meets.
        """
        self._check(methods)
        best: Searched | None = None
        unmet: list[Unmet] = []
        for name in dict.fromkeys(methods):
            method = METHODS[name]
            while method.drop < self._blocks:
                called = f"{name}-{method.drop}" if method.drop else name
                out = self.out if best is None else self.out.with_name(f"{self.out.name}-{called}")
                better = False
                try:
                    done = self.spend(method, out)
                except Unmet as error:
                    say(f"search: {called}: {error}")
                    unmet.append(error)
                else:
                    if len(methods) > 1:
                        say(f"search: {called}: {done.line}")
                    better = best is None or done.order < best.order
                    best = done if better else best
                # More blocks are dropped for as long as that is better, or until what is left fits.
                if not method.drop or not (better or (best is None and self.budget.nats is None)):
                    break
                method = replace(method, drop=method.drop + 1)
        if best is None:
            raise unmet[-1]
        return best

    def _check(self, methods: Sequence[str]) -> None:
        """Raise `UserError` for unknown methods and wrong settings, which else would be told after hours of work."""
        for name in methods:
            if name not in METHODS:
                raise UserError(f"--methods {name!r}: some of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
        steps: list[JsonObject] = [{"quantize.gptq": dict(self.settings)}]
        asked, plain = self._recipe(steps, self.overrides), self._recipe(steps, ())
        for part in ("model", "steps", "seed"):
            if getattr(asked, part) != getattr(plain, part):
                raise UserError(
                    f"an override changes the {part} of a search ({', '.join(self.overrides)}), whose costs are "
                    "foretold without it; override tasks alone, and edit the recipe that the search writes"
                )

    def spend(self, method: Method, out: Path) -> Searched:
        """Find the choice of one method within the budget, run its recipe in `out`, and compare.

        A budget of quality is met if the upper end of the measured interval (95 %) is; else it is tried again with a
        lower aim, in `out-2` and `out-3`. Raises `Unmet` where no choice meets the budget, `LlmqError` for a stage
        larger than its budget.
        """
        before, table, limit = self._foretold(method)
        aim = self.budget.nats or 0.0
        done: Searched | None = None
        for attempt in range(1, TRIES + 1):
            try:
                found = within_kl(table, aim) if limit is None else within_bytes(table, limit)
                rounding = step_of(found, {**self.settings, **method.settings}, method.rounding)
            except Unmet as error:
                if done is None:
                    raise
                say(f"search: {error}")
                break
            say(f"search: {in_bytes(found.bytes)} foretold, KL {found.kl:.4f} nats a token")
            folder = out if attempt == 1 else out.with_name(f"{out.name}-{attempt}")
            job = self._recipe([*before, rounding], self.overrides)
            done = Searched(self.run(job, folder), found, self.budget, limit)
            size, upper = done.told["bytes_on_disk"], done.upper
            if limit is not None and size is not None and size > limit:
                raise LlmqError(f"the stage has {size} bytes, and its budget was {limit}; say so to the makers of llmq")
            if done.met or upper is None or self.budget.nats is None:
                break
            aim *= 0.95 * self.budget.nats / upper
        assert done is not None
        _write_picture(done, table)
        return done

    def _foretold(self, method: Method) -> tuple[list[JsonObject], "Table", int | None]:
        """The steps before the rounding, the table of the model that they leave, and the bytes at most."""
        context, base = self._opened
        step = self._step
        limit = self.budget.bytes(self._sizes, base)
        if limit is not None:
            check_bytes(self._sizes, limit, method.drop)  # before the costs, which take minutes
        if not method.drop:
            return [], step.foretold(base, context), limit
        windows = {key: self.settings[key] for key in ("data", "samples", "length") if key in self.settings}
        entry: JsonObject = {"prune.layers": {"drop": method.drop, **windows}}
        dropping: Any = plugin.build(entry)
        dropping.check_base(base)
        with partials.scratch() as folder:
            left = dropping.apply(base, folder, context)
            return [entry], replace(step.foretold(left, context), lost=step.lost(left, base, context)), limit

    @cached_property
    def _step(self) -> Any:
        """The `quantize.gptq` that foretells."""
        step: Any = plugin.build({"quantize.gptq": {**SETTINGS, **self.settings}})
        step.check()
        return step

    @cached_property
    def _opened(self) -> tuple[Context, "Artifact[LanguageModel]"]:
        context = Context(environment.prepare(self.device, self.seed, None), self.seed)
        opener: Any = plugin.build(dict(self.model), "models")
        return context, opener.base(context)

    @cached_property
    def _sizes(self) -> "Sizes":
        context, base = self._opened
        sizes: Sizes = self._step.sizes(base, context)
        return sizes

    @property
    def _blocks(self) -> int:
        return len(self._sizes.blocks)

    def _recipe(self, steps: list[JsonObject], overrides: Sequence[str]) -> "Recipe":
        from llmq import recipe

        plain = {"model": self.model, "steps": steps, "evaluate": self.tasks, "seed": self.seed}
        plain |= {"device": self.device}
        # Overrides are folded into the data itself.
        job = recipe.of_source(recipe.Source("search", deepcopy(plain)), "search", overrides)
        if lost := {"tasks.size", "tasks.divergence"} - {task.word for task in job.evaluate}:
            raise UserError(f"a search asks {' and '.join(sorted(lost))}, which are not among the tasks that are named")
        return job

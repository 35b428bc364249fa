"""The best compression of an image model within a budget, written as a recipe, run and measured.

A budget of a drop (`top1`, `map`, `psnr`) is met by int8 with layers back in float: `quantize.int8` and its
`accuracy_drop`, told by training images. A budget of multiplications is met by channels taken out, at a ratio for each
layer: each group of layers is cut alone, and an integer program takes the ratios that move the outputs least; the
network before teaches the smaller one. The recipe is an ordinary one, to be edited and run again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.terminal import say
from llmq.types import Context, JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.report import Report

HEADLINE = {"classifier": "top1", "detector": "map", "super-resolution": "psnr"}
"""The figure by which a network with fewer multiplications is told beside the base."""


@dataclass(frozen=True)
class ImageSearched:
    """A search at its end: what was asked, what was foretold, and what was measured of the last stage."""

    report: "Report"
    budget: JsonObject
    foretold: JsonObject

    @property
    def told(self) -> JsonObject:
        """Budget, foretold and measured figures; a drop with the upper end of its 95 % interval, on held-out images."""
        return {
            "budget": self.budget,
            "foretold": self.foretold or self._foretold_drops(),
            "measured": self._measured(),
        }

    @property
    def code(self) -> int:
        """The exit code: 0 for a budget that is met, 1 for one that is not, 3 where the interval holds the bound."""
        measured = self._measured()
        if "macs" in self.budget:
            return 0 if measured["macs"] <= self.budget["macs"] else 1
        ends = [(measured[name]["ci95"], bound) for name, bound in self._bounds().items()]
        if any(ci95 is None or ci95[0] <= bound < ci95[1] for ci95, bound in ends):
            return 3
        return 0 if all(ci95[1] <= bound for ci95, bound in ends) else 1

    @property
    def picture(self) -> None:
        """A search of image models draws none."""
        return

    @property
    def met(self) -> bool:
        """True if the budget is met."""
        return self.code == 0

    @property
    def line(self) -> str:
        """The same in words."""
        verdict = {0: "met", 1: "MISSED", 3: "undecided, more held-out images would settle it"}[self.code]
        told = self.told
        return "; ".join([*(f"{key} {_plain(told[key])}" for key in ("budget", "foretold", "measured")), verdict])

    def _notes(self) -> JsonObject:
        notes: JsonObject = next(s["notes"] for s in self.report.stages if s["name"] == self._stage_that_met())
        return notes

    def _stage_that_met(self) -> str:
        wanted = "prune.channels" if "macs" in self.budget else "quantize.int8"
        return next(str(s["name"]) for s in self.report.stages if s["name"].endswith(wanted))

    def _bounds(self) -> JsonObject:
        bounds: JsonObject = self._notes()["accuracy_drop"]["bound"]
        return bounds

    def _foretold_drops(self) -> JsonObject:
        account = self._notes()["accuracy_drop"]
        return {**account["drop_after"], "back_to_float": account["back_to_float"], "bytes_more": account["bytes_more"]}

    def _measured(self) -> JsonObject:
        """The drops of the last stage from the base, and its multiplications or bytes."""
        last = self.report.stages[-1]["name"]
        names = self._bounds() if "macs" not in self.budget else [*HEADLINE.values()]
        drops = {
            c["metric"]: {
                "drop": 0.0 - c["difference"],
                "ci95": c["ci95"] and [-c["ci95"][1], -c["ci95"][0]],
                "n": c["n"],
            }
            for c in self.report.comparisons
            if c["stage"] == last and c["metric"] in names and c["task"] != "fidelity"
        }
        if "macs" in self.budget:
            return {"macs": self._notes()["macs"][1], **drops}
        if lost := [name for name in names if name not in drops]:
            raise UserError(f"{last} has no {lost[0]} beside the base; ask a task for it, by --suite")
        sizes = [m for m in self.report.measurements if m["stage"] == last and m["metric"] == "bytes_on_disk"]
        return {**drops, **{m["metric"]: m["value"] for m in sizes}}


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ImageSearch:
    """A search for the last stage in a folder. `run` runs a recipe."""

    run: Callable[["Recipe"], "Report"]
    stage: Artifact[Any]
    data: str
    samples: int
    tasks: object
    seed: int
    overrides: Sequence[str] = ()
    device: str = "auto"

    def within(self, asked: Mapping[str, str]) -> ImageSearched:
        """Find, run and measure what meets one budget: `{"macs": "0.5x"}`, or drops such as `{"top1": "0.3pt"}`."""
        if "macs" not in asked:
            drops = {name: value.strip().removeprefix("-") for name, value in asked.items()}
            step: JsonObject = {
                "quantize.int8": {"data": self._entry(), "samples": self.samples, "accuracy_drop": drops}
            }
            return ImageSearched(self.run(self._recipe([step])), dict(drops), {})
        if len(asked) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in asked)}: name --macs alone, or drops alone")
        trials = self._trials()
        budget = int(share_of(asked["macs"]) * trials.whole)
        ratios, macs, cost = trials.within(budget)
        say(f"search: {macs / trials.whole:.3f}x of the multiplications foretold")
        modules = {f"^{re.escape(name)}$": {"ratio": ratio} if ratio else "skip" for name, ratio in ratios.items()}
        steps: list[JsonObject] = [
            {"prune.channels": {"modules": modules}},
            {"adapt.distill": {"data": self._entry(), "teacher": "base"}},
        ]
        foretold = {"macs": macs, "error_of_outputs": cost}
        return ImageSearched(self.run(self._recipe(steps)), {"macs": budget, "of": trials.whole}, foretold)

    def _trials(self) -> Any:
        import torch

        model = self.stage.model
        if model.two_stages:
            raise UserError(f"--macs: {model.title} cannot be taught once it is cut; take a detector of one stage")
        data: Any = plugin.build(self._entry(), "data")
        inputs = list(model.calibration(data.read(), self.samples, self.seed))
        inputs = [torch.cat(inputs)] if len({x.shape for x in inputs}) == 1 else inputs
        step: Any = plugin.build("prune.channels")
        return step.trials(self.stage, inputs)

    def _entry(self) -> JsonObject:
        """The data, whose low-resolution images are as much smaller as the network enlarges."""
        model = self.stage.model
        ((word, settings),) = plugin.data_entry(self.data, model.kind).items()
        fields = plugin.load(f"data.{word}").model_fields
        both = [name for name in ("scale", "dimensions") if name in fields and name in type(model).model_fields]
        return {word: {**settings, **{name: getattr(model, name) for name in both}}}

    def _recipe(self, steps: list[JsonObject]) -> "Recipe":
        from llmq import recipe

        model = self.stage.model
        settings = {name: value for name, value in plugin.to_plain(model).items() if value is not None}
        opened = {**settings, "weights": str(self.stage.weights.resolve() / "model.safetensors")}
        entry = {model.word.removeprefix("models."): opened}
        plain = {"model": entry, "steps": steps, "evaluate": self.tasks or model.suite, "seed": self.seed}
        plain |= {"device": self.device}
        return recipe.of_source(recipe.Source("search", plain), "search", self.overrides)


def share_of(macs: str) -> float:
    """The number of `0.5x`. Raises `UserError` for others."""
    match = re.fullmatch(r"(0?\.\d+)\s*x", macs.strip().lower())
    if not match or not float(match[1]):
        raise UserError(f"--macs {macs!r}: a share of the base's multiplications, such as 0.5x")
    return float(match[1])


def stage_of(target: str) -> Artifact[Any]:
    """The last stage in a folder. Raises `UserError` for what no recipe can begin with."""
    from llmq import targets

    if not ((Path(target) / "artifact.json").is_file() or (Path(target) / "report.json").is_file()):
        raise UserError(f"{target!r} is no stage and no run: a budget of image models is of a trained network's stage")
    name, bring = targets.last_stage(target, "causal_lm")
    artifact = bring(Context("cpu", 0))
    if artifact.model.kind not in HEADLINE:
        raise UserError(f"{name} is a {artifact.model.kind}, and these budgets are of a {', '.join(HEADLINE)} network")
    if artifact.runtime != "torch" or (artifact.weights / "shapes.json").is_file():
        raise UserError(f"{name} is a graph, or pruned already: name the stage of whole weights before it")
    return artifact

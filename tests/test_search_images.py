"""A budget of multiplications or of a drop for image models: foretold, written as a recipe, run, measured."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import CPU, apply

import llmq
from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.searching.images import ImageSearch, ImageSearched, share_of, stage_of

RESNET = {
    "timm_classifier": {
        "architecture": "resnet10t",
        "model_args": {"channels": [16, 16, 32, 32]},
        "classes": 10,
        "channels": 1,
        "input_size": 32,
        "crop_pct": 1.0,
    }
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("trained")
    step = plugin.build({"adapt.train": {"data": "digits", "max_steps": 5, "held_out_examples": 0}})
    made = step.apply(plugin.build(RESNET, "models").base(CPU), folder, CPU)
    made.save(folder)
    return made


@pytest.fixture(scope="module")
def trials(stage) -> Any:
    step: Any = plugin.build("prune.channels")
    return step.trials(stage, list(stage.model.calibration(plugin.build("data.digits").read(), 8, 0)))


def test_ratios_within_a_budget_multiply_as_foretold_and_cost_less_than_one_ratio_for_all(trials, stage, tmp_path):
    budget = int(0.5 * trials.whole)
    ratios, macs, cost = trials.within(budget)
    assert macs <= budget
    assert len(set(ratios.values())) > 1  # by layer
    modules = {f"^{name}$": {"ratio": ratio} if ratio else "skip" for name, ratio in ratios.items()}
    made = apply("prune.channels", stage, tmp_path / "cut", modules=modules)
    assert made.notes["macs"] == [trials.whole, macs]
    same = [sum(0 < ratio <= 0.5 for ratio, _ in group) for group in trials.cuts]
    assert trials.counted(same) <= budget  # one ratio for all lies within the budget, too
    assert cost <= sum(trials.costs[i][j] for i, j in enumerate(same))


def test_a_budget_below_what_pruning_leaves_is_refused(trials):
    with pytest.raises(
        UserError, match=r"with 75% of every group gone 0\.\d\dx of the multiplications stay, and 0\.01"
    ):
        trials.within(int(0.01 * trials.whole))


def test_a_group_that_is_left_whole_costs_nothing(trials):
    ratios, macs, cost = trials.within(trials.whole)
    assert (set(ratios.values()), macs, cost) == ({0.0}, trials.whole, 0)


@pytest.mark.parametrize("macs", ["2x", "0x", "half", "-0.5x"])
def test_a_share_that_is_none_is_refused(macs):
    with pytest.raises(UserError, match="a share of the base's multiplications, such as"):
        share_of(macs)


def test_what_no_search_can_begin_with_is_refused(stage, tmp_path):
    with pytest.raises(UserError, match="is no stage and no run"):
        stage_of(str(tmp_path))
    pruned = apply("prune.channels", stage, tmp_path / "cut")
    pruned.save(tmp_path / "cut")
    with pytest.raises(UserError, match="is a graph, or pruned already"):
        stage_of(str(tmp_path / "cut"))
    assert stage_of(str(stage.weights)).model.kind == "classifier"
    for how, told in (
        ({"macs": "0.5x", "kl": 0.1}, "--kl is of language models, and --macs of image models"),
        ({"top1": "1pt", "length": 256}, "--length is of language models, and --top1 of image models"),
        ({"top1": "1pt"}, "needs --data"),
        ({"top1": "1pt", "macs": "0.5x", "data": "digits"}, "name --macs alone, or drops alone"),
        ({"map": "0.01", "data": "digits"}, "'map' is no metric of a classifier; top1"),
    ):
        with pytest.raises(UserError, match=told):
            llmq.search(stage.weights, out=tmp_path / "out", **how)


def test_the_data_are_of_the_scale_of_the_network_and_of_nothing_else():
    def entry(model: dict[str, Any], data: str) -> Any:
        base: Any = plugin.build(model, "models").base(CPU)
        return ImageSearch(lambda recipe: None, base, data, 8, None, 0)._entry()

    assert entry({"edsr": {"scale": 3}}, "rock") == {"rock": {"scale": 3, "dimensions": 2}}
    assert entry({"srcnn": {"scale": 2}}, "scan.npz") == {"rock": {"path": "scan.npz", "scale": 2}}
    assert entry({"torchvision_detector": {}}, "scenes") == {"scenes": {}}  # a scale of another thing


def searched(ci95: list[float], bound: float) -> ImageSearched:
    notes = {"accuracy_drop": {"bound": {"top1": bound}, "drop_after": {}, "back_to_float": [], "bytes_more": 0}}
    beside = {"stage": "1-quantize.int8", "metric": "top1", "task": "accuracy", "difference": -sum(ci95) / 2, "n": 99}
    report: Any = SimpleNamespace(
        stages=[{"name": "0-base", "notes": {}}, {"name": "1-quantize.int8", "notes": notes}],
        comparisons=[{**beside, "ci95": [-ci95[1], -ci95[0]]}],
        measurements=[],
    )
    return ImageSearched(report, {"top1": bound}, {})


@pytest.mark.parametrize(("ci95", "code"), [([-0.01, 0.002], 0), ([0.001, 0.02], 3), ([0.004, 0.02], 1)])
def test_a_drop_is_met_missed_or_undecided_by_its_interval(ci95, code):
    found = searched(ci95, 0.003)
    assert (found.code, found.met) == (code, code == 0)
    assert found.line.endswith(("met", "MISSED", "undecided, more held-out images would settle it"))


@pytest.mark.slow
def test_a_search_writes_a_recipe_that_is_run_and_measured(stage, tmp_path):
    how: dict[str, Any] = {"data": "digits", "out": tmp_path / "macs"}
    found = llmq.search(stage.weights, ["adapt.distill.max_steps=4"], macs="0.6x", **how)
    told = found.told
    assert told["measured"]["macs"] == told["foretold"]["macs"] <= told["budget"]["macs"]
    assert found.met
    assert "top1" in told["measured"]
    assert (tmp_path / "macs/recipe.yaml").is_file()
    int8 = llmq.search(stage.weights, top1="20pt", data="digits", out=tmp_path / "int8", samples=16)
    assert int8.told["foretold"]["top1"]["ci95"][1] <= 0.2
    assert int8.told["measured"]["bytes_on_disk"] < stage.bytes_on_disk

"""llmq search: the allotment is exact, no budget is exceeded, the recipe is an ordinary one."""

import ctypes
import itertools
import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import CPU, base_of, logits_of, reshaped, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import llmq
from llmq import api, plugin
from llmq.cli import app
from llmq.errors import UserError
from llmq.layers import matches
from llmq.matrix import allotment
from llmq.matrix.allotment import allot
from llmq.matrix.grid import round_to_nearest
from llmq.report import Report
from llmq.searching import text as searching
from llmq.searching.budget import Budget, budget_bytes
from llmq.searching.text import Found, Searched, modules_of, within_bytes, within_kl
from llmq.text import end_check, sensitivity
from llmq.text.grids import Grid
from llmq.text.sensitivity import table_of

CALIBRATION = {"samples": 4, "length": 64, "hessian": "loss"}

pytestmark = pytest.mark.usefixtures("one_thread")

parts = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None, database=None)
@given(parts, st.integers(0, 4000))
def test_the_allotment_is_the_best_of_all_that_fit(parts, budget):
    costs, sizes = ([[choice[i] for choice in part] for part in parts] for i in (0, 1))
    taken = allot(costs, sizes, budget)
    every = itertools.product(*(range(len(part)) for part in parts))
    fitting = [c for c in every if sum(sizes[i][j] for i, j in enumerate(c)) <= budget]
    if not fitting:
        assert taken is None
        return
    assert tuple(taken) in fitting
    best = min(sum(costs[i][j] for i, j in enumerate(c)) for c in fitting)
    assert sum(costs[i][j] for i, j in enumerate(taken)) <= best + 1e-5 * (best + max(map(max, costs)))


def test_what_the_solver_prints_is_no_answer(capfd):
    with allotment._printing_to_stderr():
        ctypes.CDLL(None).puts(b"of the library")
    print("an answer")
    out, err = capfd.readouterr()
    assert (out, err) == ("an answer\n", "of the library\n")


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    """A model of 3 blocks with head and embeddings in one."""
    folder = tmp_path_factory.mktemp("search") / "model"
    return base_of(reshaped(tiny_llama, folder, num_hidden_layers=3, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def table(base):
    return table_of(base, plugin.build({"quantize.gptq": CALIBRATION}), 0, "cpu")


def built(found, base, folder, **settings):
    """The stage of a choice, by the recipe that a person would read; rounded to nearest, which has the same bytes."""
    plain = searching.step_of(found, {})["quantize.gptq"]
    folder.mkdir()
    return plugin.build({"quantize.rtn": {"mse": False, **plain, **settings}}).apply(base, folder, CPU)


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_random_budgets_are_never_exceeded(count, base, table, tmp_path):
    most = table.rest + sum(map(max, table.sizes.values()))
    draw, closest = random.Random(0), 0.0
    for i in range(count):
        budget = draw.randint(table.least, most - most // 50)
        found = within_bytes(table, budget)
        stage = built(found, base, tmp_path / str(i))
        assert stage.bytes_on_disk <= found.bytes <= budget
        closest = max(closest, stage.bytes_on_disk / budget)
    assert closest > 0.97


def test_a_budget_below_the_least_is_refused_with_the_least(table):
    with pytest.raises(UserError, match="smallest stage has"):
        within_bytes(table, table.least - 1)
    assert within_bytes(table, table.least).bytes == table.least


def test_more_bytes_never_cost_more_and_a_divergence_is_met_by_as_few_as_needed(table):
    budgets = [int(table.least * (1 + i / 8)) for i in range(6)]
    costs = [within_bytes(table, budget).kl for budget in budgets]
    assert costs == sorted(costs, reverse=True)
    found = within_kl(table, costs[2] * (1 + 1e-5))  # the solver may miss what meets the budget to the last digit
    assert found.kl <= costs[2] * (1 + 2e-5)
    assert found.bytes <= budgets[2]


def test_costs_fall_with_bits_and_the_kept_table_is_reused(base, table, monkeypatch):
    for name, costs in table.costs.items():
        assert all(cost >= 0 for cost in costs)
        by_bits = {(g.bits, g.group_size): cost for g, cost in zip(table.grids[name], costs, strict=True) if g}
        assert by_bits[2, 32] > by_bits[3, 32] > by_bits[4, 32] > by_bits[8, 64] > costs[-1] == 0
    monkeypatch.setattr(sensitivity, "sensitivities", None)
    again = table_of(base, plugin.build({"quantize.gptq": CALIBRATION}), 0, "cpu")
    assert again.costs == table.costs
    with pytest.raises(TypeError):  # another seed, other windows, another table
        table_of(base, plugin.build({"quantize.gptq": CALIBRATION}), 1, "cpu")


def test_another_configuration_of_the_same_weights_has_costs_of_its_own(base, table, tmp_path, monkeypatch):
    folder = shutil.copytree(base.weights, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    monkeypatch.setattr(sensitivity, "sensitivities", None)
    with pytest.raises(TypeError):
        table_of(base_of(folder), plugin.build({"quantize.gptq": CALIBRATION}), 0, "cpu")


def test_costs_are_corrected_by_what_rounding_does_to_each_token_and_to_the_end(base):
    source = base.model.skeleton(base, "cpu")
    layers = [name for block in source.blocks for name in source.linears(block)]
    rounded = {
        bits: {
            name: round_to_nearest(source.tensor(f"{name}.weight").float(), bits, 32, True).weight() for name in layers
        }
        for bits in (2, 4)
    }
    windows = some_ids(3, 40).tolist()
    own = base.model.open(base, "cpu").module.float()
    harms = dict.fromkeys(layers, 0.0)
    kept = {}

    def keep(name, inputs, output):
        output.retain_grad()
        kept[name] = inputs, output

    for name in layers:
        own.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: keep(name, args[0], out))
    for window in windows:
        ids = torch.tensor([window])
        torch.nn.functional.cross_entropy(own(ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        for name, (inputs, output) in kept.items():
            off = inputs[0] @ (rounded[4][name] - own.get_submodule(name).weight).t()
            harms[name] += float((off * output.grad[0]).sum(-1).square().sum()) / 2 / 120
    made = end_check.harms_of(source, rounded[4].__getitem__, layers, windows)
    assert made == pytest.approx(harms, rel=0.02)  # it computes in bfloat16

    costs = {bits: {name: scale * harms[name] for name in layers} for bits, scale in ((2, 40.0), (4, 0.5))}
    costs[4][layers[3]] *= 10
    ways = {bits: its.__getitem__ for bits, its in rounded.items()}
    factors = end_check.corrections(source, ways, costs, 4, windows)
    assert factors[4][layers[3]] / factors[4][layers[0]] == pytest.approx(0.1, rel=0.02)
    for bits, its in rounded.items():
        after = base.model.open(base, "cpu").module
        before = logits_of(after, torch.tensor(windows)).float().log_softmax(-1)
        for name, weight in its.items():
            after.get_submodule(name).weight.data = weight.to(after.dtype)
        q = logits_of(after, torch.tensor(windows)).float().log_softmax(-1)
        foretold = sum(factors[bits][name] * cost for name, cost in costs[bits].items())
        assert foretold == pytest.approx(float((before.exp() * (before - q)).sum(-1).mean()), rel=0.05)


@pytest.mark.parametrize(("count", "checked"), [(1, 1), (2, 1), (3, 1), (7, 1), (8, 2), (12, 3), (64, 4)])
def test_costs_are_checked_on_windows_that_nothing_was_rounded_by(count, checked):
    seen, aside = sensitivity._apart_from([[0]] * count)
    assert len(aside) == checked
    assert sorted({*seen, *aside}) == list(range(count))
    assert not {*seen} & {*aside} or count == 1


def test_patterns_name_each_layer_and_its_grid():
    grids = {f"model.layers.{i}.mlp.down_proj": Grid(bits=8 if i in (1, 11) else 4) for i in range(12)}
    grids |= {f"model.layers.{i}.mlp.up_proj": None if i == 1 else Grid(bits=3, group_size=32) for i in range(12)}
    modules = modules_of(Found(grids, 0, 0.0), Grid())
    assert len(modules) == 3
    for name, grid in grids.items():
        settings = next((its for pattern, its in modules.items() if matches(pattern, name)), {})
        assert settings == ("skip" if grid is None else {k: v for k, v in grid.model_dump().items() if k in settings})
        assert settings or grid == Grid()


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({}, "no budget: name one of"),
        ({"size": "0.4x", "bits": 4.0}, "--size and --bits: name one of"),
        ({"bits": -1.0}, "--bits -1.0: a number above 0"),
        ({"kl": 0.0}, "--kl 0.0: a number above 0"),
        ({"bits": float("inf")}, "--bits inf: a number above 0"),
        ({"perplexity": "9" * 400 + "x"}, "a multiple of the base's, above 1"),
        ({"perplexity": "0.9x"}, "--perplexity '0.9x': a multiple of the base's, above 1"),
    ],
)
def test_a_budget_is_one_number(asked, wrong):
    with pytest.raises(UserError, match=re.escape(wrong)):
        Budget(**asked)


def test_sizes_are_shares_and_bytes(base):
    assert budget_bytes("0.5x", base) == base.bytes_on_disk // 2
    assert budget_bytes("100MB", base) == 10**8
    assert budget_bytes("1.5 GiB", base) == 3 * 2**29
    for wrong in "x", "many", "0x", "-3MB", "5 parsecs", "9" * 400 + "x":
        with pytest.raises(UserError, match="share of the base"):
            budget_bytes(wrong, base)


@pytest.mark.slow
def test_the_command_writes_a_recipe_runs_it_and_tells_foretold_beside_measured(base, tmp_path):
    asked = [
        "search",
        str(base.weights),
        "--size",
        "0.6x",
        "--samples",
        "4",
        "--length",
        "64",
        "--out",
        str(tmp_path / "r"),
    ]
    asked += ["--json", "perplexity.limit=2", "divergence.windows=2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["bytes_on_disk"] <= told["foretold_bytes"] <= told["budget_bytes"] == int(0.6 * base.bytes_on_disk)
    assert told["foretold_kl"] > 0
    assert told["met"]
    picture = (tmp_path / "r" / "search.svg").read_text()
    assert "chosen" in picture
    assert "down_proj" in picture
    recipe = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())
    assert recipe["steps"][0]["quantize.gptq"]["modules"]
    again = llmq.run(tmp_path / "r" / "recipe.yaml", out=tmp_path / "again")
    name = again.stages[-1]["folder"]
    for file in (tmp_path / "r" / name).glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / name / file.name).read_bytes()


@pytest.mark.slow
def test_each_method_spends_the_budget_and_the_best_as_measured_is_told(base, tmp_path, capsys):
    asked = {"samples": 2, "length": 32, "size": "0.6x", "out": tmp_path / "r"}
    done = llmq.search(
        base.weights,
        {"perplexity.limit": 1, "divergence.windows": 2, "divergence.window": 32},
        methods=["gptq", "awq", "prune.layers"],
        **asked,
    )
    runs = {folder.name: Report.read(folder) for folder in (tmp_path / "r", *tmp_path.glob("r-*"))}
    assert {"r", "r-awq", "r-prune.layers-1"} <= set(runs)
    limit, kls = int(0.6 * base.bytes_on_disk), {}
    for name, report in runs.items():
        found = {m["metric"]: m["value"] for m in report.measurements if m["stage"] == report.stages[-1]["name"]}
        assert found["bytes_on_disk"] <= limit
        kls[name] = found["kl_to_base"]
    assert done.told["kl_to_base"] == min(kls.values())
    assert [next(iter(step)) for step in runs["r-prune.layers-1"].recipe["steps"]] == ["prune.layers", "quantize.gptq"]
    assert [next(iter(step)) for step in runs["r-awq"].recipe["steps"]] == ["quantize.awq"]


def test_a_search_that_was_killed_goes_on_and_begins_the_runs_that_had_not_begun(tmp_path, monkeypatch):
    gone_on = []
    (tmp_path / "r-2").mkdir()
    monkeypatch.setattr(api, "run", lambda job, out, resume, trust_remote_code: gone_on.append((out.name, resume)))
    names = ("r", "r-2", "r-awq")
    monkeypatch.setattr(searching.Search, "best", lambda self, _: [self.run(None, tmp_path / name) for name in names])
    llmq.search("model", size="0.5x", out=tmp_path / "r", resume=True)
    assert gone_on == [("r", True), ("r-2", True), ("r-awq", False)]


def test_the_device_of_a_search_is_that_of_its_run(base, tmp_path):
    model = {"causal_lm": {"weights": str(base.weights)}}
    asked = searching.Search(llmq.run, model, Budget("0.6x"), {}, searching.TASKS, 0, tmp_path, device="cpu")
    assert asked._recipe([], ()).device == "cpu"


def test_an_unknown_method_of_a_search_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"--methods 'gtpq': some of gptq, awq, prune.layers; did you mean 'gptq'"):
        llmq.search(base.weights, size="0.6x", methods=["gtpq"], out=tmp_path / "r")


def test_a_suite_that_measures_no_divergence_is_refused_before_anything_runs(base, tmp_path):
    def run(recipe, folder):
        pytest.fail("it ran")

    model = {"causal_lm": {"weights": str(base.weights)}}
    asked = searching.Search(run, model, Budget("0.6x"), {}, ["size"], 0, tmp_path)
    with pytest.raises(UserError, match=r"a search asks tasks.divergence, which are not among"):
        asked.best(["gptq"])
    with pytest.raises(UserError, match=r"dtype: 'foo' of models.causal_lm is wrong"):
        llmq.search(base.weights, size="0.6x", dtype="foo", out=tmp_path / "r")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"kl": 1e-3}, {"perplexity": "1.001x"}], ids=str)
def test_quality_that_was_foretold_too_good_is_tried_again(budget, base, tmp_path, monkeypatch):
    aims = []

    def aimed(table, aim):
        aims.append(aim)
        return within_kl(table, aim)

    told = {"bytes_on_disk": 1, "kl_to_base": 1e-3, "kl_upper": 2e-3, "perplexity_ratio_upper": 1.001**2}
    monkeypatch.setattr(searching, "within_kl", aimed)
    monkeypatch.setattr(searching.Searched, "told", told)
    asked = {"samples": 2, "length": 32, "out": tmp_path / "r"}
    done = llmq.search(base.weights, {"perplexity.limit": 1, "divergence.windows": 1}, **budget, **asked)
    nats = done.budget.nats
    assert aims == pytest.approx([nats, 0.475 * nats, 0.225625 * nats])
    assert (tmp_path / "r-3" / "recipe.yaml").is_file()
    assert not done.met


def searched(budget, kls=((0.04, 0.01),), n=20, ends=((1.0, 1.04),)):
    """A search whose last stage has a divergence and an error on each text, and an interval of perplexities or None."""
    rows = [("size", "bytes_on_disk", 1, 0.0)]
    rows += [(f"divergence-{i}", "kl_to_base", kl, stderr) for i, (kl, stderr) in enumerate(kls)]
    rows += [(f"perplexity-{i}", "token_perplexity", 9.0, 0.1) for i in range(len(ends))]
    keys = "task", "metric", "value", "stderr"
    figures = [{"stage": "1", "n": n, **dict(zip(keys, row, strict=True))} for row in rows]
    beside = [
        {"stage": "1", "task": f"perplexity-{i}", "metric": "token_perplexity", "ratio": 1.02, "ratio_ci95": its}
        for i, its in enumerate(ends)
        if its
    ]
    report = Report(2, {}, {}, [{"name": "1"}], figures, beside, [])
    return Searched(report, Found({}, 1, 0.04), budget, None)


def test_quality_is_met_by_the_upper_end_of_its_interval():
    assert searched(Budget(kl=0.07)).met
    assert not searched(Budget(kl=0.06)).met  # 0.04 + 2.09 * 0.01
    assert not searched(Budget(kl=0.07), n=1).met  # nothing tells how far off one window is
    assert searched(Budget(perplexity="1.05x")).met
    assert not searched(Budget(perplexity="1.03x")).met
    assert not searched(Budget(perplexity="1.05x"), ends=[None]).met
    assert not searched(Budget(perplexity="1.05x"), ends=[]).met
    assert "MISSED" in searched(Budget(perplexity="1.03x")).line


def test_quality_on_several_texts_is_that_of_the_worst():
    assert searched(Budget(perplexity="1.05x"), ends=[(1.0, 1.02), (1.0, 1.04)]).met
    for ends in [(1.0, 1.09), (1.0, 1.02)], [(1.0, 1.02), (1.0, 1.09)], [(1.0, 1.02), None]:
        assert not searched(Budget(perplexity="1.05x"), ends=ends).met
    assert not searched(Budget(kl=0.07), kls=[(0.9, 0.01), (0.04, 0.01)]).met
    assert searched(Budget(kl=0.07), kls=[(0.01, 0.01), (0.04, 0.01)]).told["kl_to_base"] == 0.04


@pytest.mark.slow
def test_a_method_that_cannot_meet_the_bytes_leaves_them_to_the_others(base, tmp_path, monkeypatch):
    source = base.model.skeleton(base, "cpu")
    sizes = sensitivity.sizes_of(base, source, False)
    spent = []

    def spend(search, method, out):
        spent.append((method.drop, out.name))
        _, table, limit = search._foretold(method)
        found = within_bytes(table, limit)
        return replace(searched(search.budget, kls=((0.04 + method.drop, 0.01),)), found=found, limit=limit)

    def search(size, *methods):
        asked = {"model": {"causal_lm": {"weights": str(base.weights)}}, "settings": {"samples": 2, "length": 32}}
        job = searching.Search(
            None, **asked, budget=Budget(str(size)), tasks=searching.TASKS, seed=0, out=tmp_path / "r"
        )
        return job.best(methods)

    monkeypatch.setattr(searching.Search, "spend", spend)
    done = search(sizes.least_without(1) + 1, "gptq", "prune.layers")
    assert spent == [(0, "r"), (1, "r"), (2, "r-prune.layers-2")]  # a second block gains nothing
    assert done.told["kl_to_base"] == 1.04
    assert done.found.bytes <= sizes.least_without(1) + 1
    spent.clear()
    assert search(sizes.least_without(2) + 1, "prune.layers", "gptq").told["kl_to_base"] == 2.04
    assert spent == [(1, "r"), (2, "r"), (0, "r-gptq")]
    with pytest.raises(UserError, match="smallest stage after 2 of 3 blocks were dropped has"):
        search(sizes.least_without(2) - 1, "gptq", "prune.layers")


def test_what_dropping_blocks_cost_is_foretold_with_the_rounding(base, table, tmp_path):
    shorter = plugin.build({"prune.layers": {"drop": 1, "samples": 2, "length": 32}}).apply(base, tmp_path, CPU)
    windows = some_ids(2, 24)
    p, q = (logits_of(its.model.open(its, "cpu").module, windows).float().log_softmax(-1) for its in (base, shorter))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    skeletons = [its.model.skeleton(its, "cpu") for its in (shorter, base)]
    lost = end_check.divergence_of(*skeletons, windows.tolist())
    assert lost == pytest.approx(expected, rel=1e-3)
    after = replace(table, lost=lost)
    assert within_bytes(after, table.least).kl == pytest.approx(within_bytes(table, table.least).kl + lost)
    assert within_kl(after, lost + 1e-3).kl <= lost + 1e-3
    with pytest.raises(searching.Unmet, match="what was dropped costs"):
        within_kl(after, lost)


@pytest.mark.parametrize("override", ["model.weights=smollm2-135m", "quantize.gptq.sweeps=0", "seed=3"])
def test_an_override_of_what_was_foretold_is_refused(override, base, tmp_path):
    with pytest.raises(UserError, match="override tasks alone"):
        llmq.search(base.weights, [override], size="0.6x", out=tmp_path / "r")

"""llmq sweep: every run once, shared beginnings made once, the front and the best by slow obvious sums."""

import json
import os
import random
import shutil
import signal
import threading
import time
from functools import partial

import psutil
import pytest
import yaml
from run_folders import accuracy, write_run

import llmq
from llmq import cli, sweeping
from llmq.cli.sweeping import as_text
from llmq.errors import UserError
from llmq.report import Report
from llmq.runs import folder as run_folder
from llmq.source import to_yaml
from llmq.sweeping import results, sharing
from llmq.sweeping.points import Point
from llmq.sweeping.spec import Range, load, name_of, recipe_of, settings_of
from llmq.types import Measurement


@pytest.fixture
def recipe(tiny_llama, tiny_jsonl, tmp_path):
    """A recipe of two steps beside which sweeps lie."""
    steps = [
        {"quantize.rtn": {"bits": 4, "group_size": 32}},
        {"adapt.lora": {"data": str(tiny_jsonl), "r": 2, "max_length": 64, "max_steps": 1, "held_out_rows": 0}},
    ]
    asked = ["size", {"perplexity": {"data": str(tiny_jsonl), "limit": 2, "window": 32}}]
    model = {"causal_lm": {"weights": str(tiny_llama)}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": model, "steps": steps, "evaluate": asked}))
    return tmp_path / "job.yaml"


@pytest.fixture
def sweep_of(recipe):
    def write(**parts):
        file = recipe.with_name("sweep.yaml")
        file.write_text(yaml.safe_dump({"recipe": "job.yaml", **parts}))
        return file

    return write


class Fake:
    """Runs that take no time; `codes` are the exit codes of each name, one a try."""

    def __init__(self, monkeypatch, figures, codes=()):
        self.ran, self.figures, self.codes = [], figures, dict(codes)
        monkeypatch.setattr(results, "judge", self.judge)
        monkeypatch.setattr(sharing, "share_beginning", lambda point, others: ())
        monkeypatch.setattr(results, "_draw", lambda done, out: None)

    def __call__(self, point):
        self.ran.append(point.name)
        return self.codes.get(point.name, [0, 0])[point.tries - 1]

    def judge(self, asked, point):
        point.losses = self.figures(point.settings)
        point.figures = dict(zip(asked.objectives, point.losses, strict=True))
        point.gate = "pass" if point.losses[1] < 3 else "fail"


def in_this_process(point):
    point.folder.mkdir(exist_ok=True)
    llmq.run(point.recipe, out=point.folder, resume=True)
    return 0


def test_a_grid_is_every_combination_and_a_list_what_it_lists(sweep_of):
    asked = load(sweep_of(grid={"adapt.lora.r": [2, 4], "seed": [0, 1, 2]}, overrides={"device": "cpu"}))
    settings = list(settings_of(asked))
    assert settings == [{"device": "cpu", "adapt.lora.r": r, "seed": s} for r in (2, 4) for s in (0, 1, 2)]
    listed = load(sweep_of(list=[{"seed": 1}, {"seed": 2, "quantize.rtn.bits": 8}]))
    assert [dict(s) for s in settings_of(listed)] == [{"seed": 1}, {"seed": 2, "quantize.rtn.bits": 8}]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({}, "one of 'grid', 'list' and 'search'"),
        ({"grid": {"seed": [1]}, "list": [{"seed": 2}]}, "one of"),
        ({"grids": {"seed": [1]}}, "did you mean 'grid'"),
        ({"grid": {"seed": 3}}, "grid"),
        ({"grid": {"seed": []}}, "no runs"),
        ({"grid": {"adapt.lora.rank": [1]}}, "unknown key 'rank'"),
        ({"list": [{"seed": 1}, {"seed": 1}]}, "same settings"),
        ({"grid": {"seed": [1]}, "gate": ["perplexity is low"]}, "cannot be read"),
        ({"grid": {"seed": [1]}, "objectives": []}, "objectives"),
        ({"search": {"seed": {"low": 5, "high": 1}}}, "low is at most high"),
        ({"search": {"seed": {"low": 0, "high": 4, "log": True}}}, "above 0 with log"),
        ({"search": {"seed": {"low": 0, "high": float("inf")}}}, "finite number"),
        ({"search": {"seed": []}}, "at least 1 item"),
    ],
)
def test_a_wrong_sweep_is_one_line_before_anything_runs(parts, told, sweep_of, tmp_path):
    with pytest.raises(UserError, match=told):
        sweeping.sweep(load(sweep_of(**parts)), tmp_path / "out", lambda point: pytest.fail("it ran"))
    assert not (tmp_path / "out").exists()


def test_a_failed_run_is_tried_once_more_and_told_of(sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(grid={"seed": [0, 1, 2]}))
    names = [name_of({"seed": s}) for s in (0, 1, 2)]
    fake = Fake(monkeypatch, lambda s: [s["seed"], s["seed"]], {names[0]: [4, 0], names[1]: [-9, 4]})
    swept = sweeping.sweep(asked, tmp_path / "out", fake)
    assert fake.ran == [names[0], names[0], names[1], names[1], names[2]]
    assert [p.name for p in swept.failed] == [names[1]]
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(r["name"], r["code"], r["tries"]) for r in told["runs"]] == [
        (names[0], 0, 2), (names[1], 4, 2), (names[2], 0, 1),
    ]  # fmt: skip
    assert "FAILED with 4" in as_text(swept)


def test_wrong_input_is_not_tried_again(sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(grid={"seed": [0, 1]}))
    names = [name_of({"seed": s}) for s in (0, 1)]
    fake = Fake(monkeypatch, lambda s: [1, 1], {names[0]: [2]})
    assert [p.name for p in sweeping.sweep(asked, tmp_path / "out", fake).failed] == names[:1]
    assert fake.ran == names


def test_the_best_is_the_first_of_those_that_pass_and_none_may(sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(grid={"seed": [0, 1, 2]}, gate=["perplexity <= 3"]))
    swept = sweeping.sweep(asked, tmp_path / "a", Fake(monkeypatch, lambda s: [s["seed"], 5 - 2 * s["seed"]]))
    assert swept.best == name_of({"seed": 2})  # the others are better and do not pass
    assert len(swept.front) == 3
    none = sweeping.sweep(asked, tmp_path / "b", Fake(monkeypatch, lambda s: [1, 9]))
    assert none.best is None


def test_figures_of_other_data_are_shown_and_not_ranked(sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(grid={"seed": [0, 1, 2]}, objectives=["token_perplexity"]))
    fake = Fake(monkeypatch, None)

    def judge(asked, point):
        seed = point.settings["seed"]
        told = f"data.file held_out, sha256 {min(seed, 1)}"
        point.measured = [Measurement("perplexity", "token_perplexity", 9.0 - seed, "per token", "lower", 4, 0.1, told)]
        point.losses = [9.0 - seed]

    monkeypatch.setattr(results, "judge", judge)
    swept = sweeping.sweep(asked, tmp_path / "out", fake)
    first, *others = (name_of({"seed": s}) for s in (0, 1, 2))
    assert (swept.best, swept.front) == (first, [first])  # the others have less, of other data
    assert [point.name for point in swept.points if "unlike protocols" in point.unlike] == others
    assert "not ranked beside the first: unlike protocols, 'sha256 1'" in as_text(swept)


def test_the_front_is_what_nothing_beats():
    rng = random.Random(0)
    for _ in range(200):
        rows = {str(i): [rng.randint(0, 4) for _ in range(3)] for i in range(rng.randint(1, 9))}
        slow = []
        for name, mine in rows.items():
            worse = [all(b <= m for b, m in zip(r, mine, strict=True)) and r != mine for r in rows.values()]
            slow += [] if any(worse) else [name]
        assert results.front(rows) == slow


@pytest.mark.slow
def test_runs_that_begin_alike_make_the_beginning_once_and_come_out_the_same(sweep_of, tmp_path):
    asked = load(sweep_of(grid={"adapt.lora.r": [2, 4]}, objectives=["token_perplexity", "bytes_on_disk"]))
    swept = sweeping.sweep(asked, tmp_path / "out", in_this_process)
    first, second = swept.points
    assert (first.shared, second.shared) == ((), ("0-base", "1-quantize.rtn"))
    weights = [next((p.folder / "1-quantize.rtn").glob("*.safetensors")) for p in (first, second)]
    assert weights[0].samefile(weights[1])
    alone = llmq.run(second.recipe, out=tmp_path / "alone", cache=False)

    def figures(report):
        return {(m["stage"], m["metric"]): m["value"] for m in report.measurements}

    assert figures(Report.read(second.folder)) == figures(alone)
    for name in second.recipe.stage_names[1:]:
        for file in (tmp_path / "alone" / name).glob("*.safetensors"):
            assert (second.folder / name / file.name).read_bytes() == file.read_bytes()
    assert "r-2" in (tmp_path / "out" / "compare.html").read_text()
    again = sweeping.sweep(asked, tmp_path / "out", lambda point: pytest.fail("it is finished"))
    assert (again.best, again.front) == (swept.best, swept.front)


def test_other_seeds_data_or_weights_share_no_beginning(recipe, tiny_jsonl):
    def hashes(**changes):
        from llmq import recipe as recipes

        return sharing.beginnings(recipes.load(str(recipe), [f"{k}={v}" for k, v in changes.items()]))

    plain = hashes()
    assert len(set(plain)) == 3
    assert hashes() == plain
    assert [a == b for a, b in zip(plain, hashes(**{"adapt.lora.r": 4}), strict=True)] == [True, True, False]
    assert [a == b for a, b in zip(plain, hashes(**{"quantize.rtn.bits": 8}), strict=True)] == [True, False, False]
    assert not set(plain) & set(hashes(seed=1))
    assert not set(plain) & set(hashes(**{"model.dtype": "float32"}))
    text = tiny_jsonl.read_text()
    try:
        tiny_jsonl.write_text(text + text.splitlines()[0].replace("1", "2") + "\n")
        assert [a == b for a, b in zip(plain, hashes(), strict=True)] == [True, True, False]
    finally:
        tiny_jsonl.write_text(text)


@pytest.fixture
def two(sweep_of, tmp_path):
    """Two runs that begin alike; the first has made its stages."""
    asked = load(sweep_of(list=[{"adapt.lora.r": 2}, {"adapt.lora.r": 4}]))
    first, second = (sweeping._point(asked, settings, tmp_path) for settings in settings_of(asked))
    sharing.share_beginning(first, [])
    for name in first.recipe.stage_names:
        (first.folder / name).mkdir(parents=True)
        (first.folder / name / "weights").write_text(name)
    first.hashes = ()  # as another process finds it
    return first, second


def test_what_was_made_of_data_or_by_code_that_has_changed_since_is_not_shared(two, monkeypatch):
    first, second = two
    assert sharing.share_beginning(second, [first]) == ("0-base", "1-quantize.rtn")
    monkeypatch.setattr(sharing, "beginnings", lambda recipe: ["changed", "since", "then"])
    first.hashes = ()
    assert sharing.share_beginning(second, [first]) == ()


def test_a_sweep_killed_while_it_shares_leaves_whole_stages_and_goes_on(two, monkeypatch):
    first, second = two

    def killed(source, target):
        if "quantize" in source:
            raise KeyboardInterrupt
        shutil.copy2(source, target)

    monkeypatch.setattr(sharing, "_link_or_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        sharing.share_beginning(second, [first])
    assert sorted(f.name for f in second.folder.iterdir()) == ["0-base", "recipe.yaml"]


def test_two_sweeps_in_one_folder_are_refused_and_a_damaged_table_too(sweep_of, tmp_path, monkeypatch):
    asked, fake = load(sweep_of(list=[{"seed": 1}])), Fake(monkeypatch, lambda s: [1, 1])
    with run_folder.held(tmp_path / "out"), pytest.raises(UserError, match="in use by process"):
        sweeping.sweep(asked, tmp_path / "out", fake)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text('{"sweep": []}')
    with pytest.raises(UserError, match="is of another sweep"):
        sweeping.sweep(asked, tmp_path / "out", fake)
    with pytest.raises(UserError, match="is a file"):
        sweeping.sweep(asked, tmp_path / "job.yaml", fake)


@pytest.mark.parametrize(
    ("low", "high", "log", "wanted"), [(0, 2, False, int), (2, 64, True, int), (0.0, 1.0, False, float)]
)
def test_a_range_of_whole_numbers_has_whole_numbers_and_another_has_others(low, high, log, wanted):
    class Trial:
        def suggest_int(self, key, low, high, log):
            return int

        def suggest_float(self, key, low, high, log):
            return float

    assert sweeping._chosen(Trial(), "key", Range(low=low, high=high, log=log)) is wanted


@pytest.mark.slow
def test_a_folder_of_another_recipe_is_refused(sweep_of, recipe, tmp_path):
    asked = load(sweep_of(list=[{"seed": 1}]))
    sweeping.sweep(asked, tmp_path / "out", in_this_process)
    recipe.write_text(recipe.read_text().replace("max_steps: 1", "max_steps: 2"))
    with pytest.raises(UserError, match="the recipe of the sweep has changed"):
        sweeping.sweep(load(sweep_of(list=[{"seed": 1}])), tmp_path / "out", in_this_process)


@pytest.mark.slow
def test_a_search_finds_what_a_grid_would_and_chooses_the_same_again(sweep_of, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    space = {"adapt.lora.r": [2, 4, 8], "adapt.lora.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
    asked = load(sweep_of(search=space, trials=30))

    def far(settings):
        return [abs(settings["adapt.lora.learning_rate"] - 1e-3) * settings["adapt.lora.r"], 1.0]

    fakes = [Fake(monkeypatch, far) for _ in range(2)]
    made = [sweeping.sweep(asked, tmp_path / str(i), fake) for i, fake in enumerate(fakes)]
    assert fakes[0].ran == fakes[1].ran
    best = next(p for p in made[0].points if p.name == made[0].best)
    assert best.settings["adapt.lora.r"] == 2
    assert best.settings["adapt.lora.learning_rate"] == pytest.approx(1e-3, rel=0.5)


def test_a_search_chooses_whole_numbers_of_whole_ranges_and_runs_no_choice_twice(sweep_of, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    asked = load(sweep_of(search={"seed": {"low": 0, "high": 2}}, trials=9))
    fake = Fake(monkeypatch, lambda s: [s["seed"], 1.0])
    sweeping.sweep(asked, tmp_path / "out", fake)
    assert set(fake.ran) <= {name_of({"seed": s}) for s in (0, 1, 2)}
    assert len(set(fake.ran)) == len(fake.ran) > 1


@pytest.mark.slow
def test_the_command_runs_each_in_a_process_and_ends_with_what_it_found(sweep_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = {"adapt.lora.learning_rate": 1e30}  # no finite weight after a step
    file = sweep_of(list=[{"adapt.lora.r": 2}, bad], gate=["bytes_on_disk <= 1kB"])
    monkeypatch.setattr("sys.argv", ["llmq", "sweep", str(file), "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 4, said
    assert "FAILED with 4" in said.out
    assert "best: none passes the gate" in said.out
    assert "1 of 2 runs failed" in said.err
    assert len(list((tmp_path / "out").glob("*.log"))) == 2


def test_the_knee_of_one_setting_is_drawn_with_its_intervals():
    from llmq.report import knee
    from llmq.types import Measurement, Samples

    curve = {0.0: (1.0, (0.9, 1.0)), 0.5: (0.8, None)}
    picture = knee.draw([knee.Panel("digits: top1", "prune.magnitude.sparsity", curve, base=0.9)])
    assert "digits: top1" in picture
    assert "prune.magnitude.sparsity" in picture
    right = Samples((1.0,) * 90 + (0.0,) * 10)
    low, high = results._interval(Measurement("accuracy", "top1", 0.9, "", "higher", 100, 0.03, "", right))
    assert low < 0.9 < high
    counted = Measurement("size", "bytes_on_disk", 10.0, "bytes", "lower", 1, 0.0, "", exact=True)
    assert results._interval(counted) is None


def test_a_recipe_within_a_sweep_is_one_and_a_bad_setting_is_told(tmp_path):
    inner = {"model": {"srcnn": {"scale": 2}}, "steps": ["prune.magnitude"], "evaluate": ["size"]}
    file = tmp_path / "thin.yaml"
    file.write_text(yaml.safe_dump({"recipe": inner, "grid": {"prune.magnitude.sparsity": [0.3, 0.6]}}))
    asked = load(file)
    one, two = (recipe_of(asked, settings) for settings in settings_of(asked))
    assert (one.name, one.steps[0].sparsity, two.steps[0].sparsity) == ("thin", 0.3, 0.6)
    file.write_text(yaml.safe_dump({"recipe": {**inner, "step": []}, "grid": {"seed": [0]}}))
    with pytest.raises(UserError, match="the recipe of thin"):
        recipe_of(load(file), {})


def test_only_a_grid_of_one_number_has_a_knee(sweep_of, tmp_path):
    for parts, drawn in (
        ({"grid": {"seed": [0, 1]}}, True),
        ({"grid": {"seed": [0, 1], "adapt.lora.r": [2]}}, False),
        ({"list": [{"seed": 0}, {"seed": 1}]}, False),
    ):
        asked = load(sweep_of(**parts))
        points = [sweeping._point(asked, s, tmp_path) for s in settings_of(asked)]
        for point in points:
            point.figures = {"token_perplexity": 3.0, "bytes_on_disk": 9.0}
        results._draw_knee(asked, points, tmp_path)
        assert (tmp_path / "knee.svg").is_file() == drawn
        (tmp_path / "knee.svg").unlink(missing_ok=True)


@pytest.mark.parametrize("changed", ["data", "code of llmq", "libraries", "weights"])
def test_a_finished_run_of_other_data_or_code_is_not_taken_for_this_one(changed, sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(list=[{"seed": 1}]))
    point = sweeping._point(asked, {"seed": 1}, tmp_path)
    sharing.share_beginning(point, [])
    point.folder.mkdir()
    (point.folder / "recipe.yaml").write_text(to_yaml(point.recipe.plain()))
    (point.folder / "report.json").write_text("{}")
    assert sweeping.finished(point)
    now = sharing.made_by(point.recipe)
    monkeypatch.setattr(sharing, "made_by", lambda recipe: {**now, changed: "other"})
    with pytest.raises(UserError, match=f"was made by other {changed} than there is now; use a new --out"):
        sweeping.finished(point)
    (point.folder / "report.json").unlink()  # a run that was killed does not go on with them either
    with pytest.raises(UserError, match=f"was made by other {changed}"):
        sweeping.finished(point)


def test_runs_at_once_wait_for_those_that_make_their_beginning(sweep_of, tmp_path, monkeypatch):
    asked = load(sweep_of(grid={"quantize.rtn.bits": [4, 8], "adapt.lora.r": [2, 4]}))
    fake, busy, most = Fake(monkeypatch, lambda s: [1, 1]), set(), []

    def run_in(point):
        busy.add(point.recipe.steps[0].bits)
        most.append(len(busy))
        time.sleep(0.2)
        busy.remove(point.recipe.steps[0].bits)  # a KeyError if two of the same beginning ran at once
        return fake(point)

    swept = sweeping.sweep(asked, tmp_path / "out", run_in, at_once=4)
    assert max(most) == 2
    assert [point.settings for point in swept.points] == [dict(s) for s in settings_of(asked)]
    assert len(fake.ran) == 4


def kill_worker_of(name, stop):
    """Kill the worker of Ray that runs a point, the first time."""
    while not stop.is_set():
        for process in psutil.process_iter(["cmdline"]):
            if any(word.endswith(f"{name}.yaml") for word in process.info["cmdline"] or ()):
                os.kill(process.ppid(), signal.SIGKILL)
                return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_of_two_workers_runs_a_sweep_and_replaces_a_killed_one(sweep_of, recipe, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    plain = yaml.safe_load(recipe.read_text())
    plain["steps"], plain["evaluate"] = plain["steps"][:1], plain["evaluate"][:1]
    recipe.write_text(yaml.safe_dump(plain))
    file = sweep_of(grid={"quantize.rtn.bits": [3, 4, 8]}, objectives=["bytes_on_disk"])
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    stop, name = threading.Event(), name_of({"quantize.rtn.bits": 4})
    killer = threading.Thread(target=kill_worker_of, args=(name, stop))
    killer.start()
    try:
        swept = llmq.sweep(file, out=tmp_path / "out", ray="local")
    finally:
        stop.set()
        killer.join()
    assert not ray.is_initialized()
    assert [p.code for p in swept.points] == [0, 0, 0]
    assert [p.tries for p in swept.points if p.name != name] == [1, 1]
    assert next(p.tries for p in swept.points if p.name == name) == 2  # its worker was killed, and another took over
    by_bits = [p.figures["bytes_on_disk"] for p in swept.points]
    assert by_bits == sorted(by_bits)
    assert swept.best == swept.points[0].name
    again = sweeping.sweep(load(file), tmp_path / "out", lambda point: pytest.fail("it is finished"))
    assert again.best == swept.best


def test_an_objective_may_be_better_higher(sweep_of, tmp_path):
    write_run(tmp_path / "run", {"0-base": [accuracy([1] * 8)], "1-rtn": [accuracy([1, 0] * 4)]})
    asked = load(sweep_of(list=[{"seed": 1}], objectives=["acc"]))
    point = Point("run", {}, recipe_of(asked, {}), tmp_path / "run", code=0)
    results.judge(asked, point)
    assert (point.losses, point.base) == ([-0.5], {"acc": 1.0})

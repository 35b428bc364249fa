"""A gate judges by the interval: what passes, what fails, and what it says when it cannot know."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import accuracy, perplexity, size, speed, write_run

from llmq import pipeline, recipe
from llmq.errors import UserError
from llmq.judge import gate, results
from llmq.report import Report
from llmq.rules import read_rule
from llmq.types import Measurement, Samples

quickly = settings(max_examples=60, deadline=None, database=None)


def one(rule: str, stage, base=None):
    """The verdict on one rule."""
    (found,) = gate.judge([read_rule(rule)], "1-x", stage, stage if base is None else base)
    return found


def test_what_may_be_more_than_1_is_no_share():
    def figure(metric, value, unit=""):
        return [Measurement("t", metric, value, unit, "higher", 64, 0.05, "c")]

    assert one("density >= 1.5", figure("density", 0.8)).verdict == "fail"
    assert one("bleu >= base - 1.5", figure("bleu", 0.9), figure("bleu", 0.8)).verdict == "pass"
    for rule, metric in (("map >= 60", "map"), ("map75 >= base - 1", "map75"), ("ssim >= 2", "bicubic_ssim")):
        with pytest.raises(UserError, match="is a share, at most 1; write"):
            one(rule, figure(metric, 0.7), figure(metric, 0.7))
    assert one("map >= base - 40pt", figure("map", 0.7), figure("map", 0.8)).verdict == "pass"
    with pytest.raises(UserError, match="density is in '', not in pt"):
        one("density >= base - 1pt", figure("density", 0.8), figure("density", 0.8))


@pytest.fixture
def run_folder(tmp_path):
    """A run of a base and of a stage that is 1.3 times as perplexed, 0.4 times as large and 1.3 times as fast."""
    rng = np.random.default_rng(0)
    losses, drift = rng.normal(2.3, 0.3, 200), rng.normal(0, 0.02, 12)
    right = rng.random(400) < 0.6
    base = [perplexity(losses), size(270), accuracy(right), accuracy(right, metric="acc_norm")]
    worse = losses + rng.normal(np.log(1.3), 0.05, 200)
    stage = [
        perplexity(worse),
        size(108),
        accuracy(right & (rng.random(400) < 0.94)),
        accuracy(right, metric="acc_norm"),
    ]
    rates = [speed(s * np.exp(drift + rng.normal(0, 0.02, 12))) for s in (26, 34)]
    return write_run(tmp_path / "run", {"0-base": [*base, rates[0]], "1-quantize.bnb": [*stage, rates[1]]})


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("perplexity <= 1.03x base", "fail"),
        ("perplexity <= 1.5x base", "pass"),
        ("perplexity <= 1.3x base", "undecided"),
        ("perplexity <= base + 10", "pass"),
        ("perplexity <= 9", "fail"),
        ("perplexity <= 20", "pass"),
        ("size <= 0.45x base", "pass"),
        ("size <= 0.39× base", "fail"),
        ("size < 0.4x base", "fail"),
        ("size <= 0.4 * base", "pass"),
        ("bytes <= 110MB", "pass"),
        ("decode >= 1.2x base", "pass"),
        ("speed > 1.5x base", "fail"),
        ("decode >= base", "pass"),
        ("arc_easy >= base - 10.0pt", "pass"),
        ("arc_easy acc >= base", "fail"),
        ("acc_norm >= base - 0.1pt", "undecided"),
        ("arc_easy:acc_norm >= 40%", "pass"),
        ("acc_norm >= 0.9x base", "pass"),
    ],
)
def test_each_kind_of_rule(run_folder, rule, verdict):
    (found,) = gate.of_run(str(run_folder), [rule])
    assert (found.verdict, found.stage, found.rule) == (verdict, "1-quantize.bnb", rule)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("perplexity >= 1.03x base", "token_perplexity is better lower; write <="),
        ("acc < base", "acc is better higher; write >="),
        ("size > 100MB", "bytes_on_disk is better lower; write <="),
    ],
)
def test_a_rule_that_only_worse_models_pass_is_refused(run_folder, llmq, rule, says):
    code, _, err = llmq("gate", run_folder, "--rule", rule)
    assert (code, err) == (2, f"llmq: rule {rule!r} passes the worse models: {says}\n")


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        (("size <= 0.45x base", "perplexity <= 1.5x base"), 0),
        (("size <= 0.45x base", "perplexity <= 1.03x base", "acc_norm >= base - 0.1pt"), 1),
        (("size <= 0.45x base", "acc_norm >= base - 0.1pt"), 3),
    ],
)
def test_the_exit_code_is_that_of_the_worst_rule(run_folder, llmq, rules, code):
    words = [word for rule in rules for word in ("--rule", rule)]
    ended, out, err = llmq("gate", "run", *words)
    assert (ended, err) == (code, "")
    assert len(out.splitlines()) == len(rules) + 1
    ended, out, _ = llmq("gate", "run", *words, "--json")
    told = json.loads(out)
    assert (ended, told["exit_code"]) == (code, code)
    assert [r["rule"] for r in told["rules"]] == list(rules)


def test_a_stage_can_be_named_and_the_base_beside_itself_passes(run_folder, llmq):
    rules = ("perplexity <= 1.00x base", "arc_easy >= base", "decode >= 1.0x base")
    words = [word for rule in rules for word in ("--rule", rule)]
    ended, out, _ = llmq("gate", "run", "--stage", "0-base", *words)
    assert ended == 0, out
    assert out.count("pass") == 4


@pytest.mark.parametrize("lost", ["0-base", "1-quantize.bnb"])
def test_a_stage_whose_tasks_all_failed_is_not_replaced_by_another(run_folder, llmq, lost):
    """The last measured stage passed for the last one, and the first measured one for the base."""
    report = json.loads((run_folder / "report.json").read_text())
    for stage in report["stages"]:
        stage["asked"] = {"seconds": 1.0}
    report["measurements"] = [m for m in report["measurements"] if m["stage"] != lost]
    (run_folder / "report.json").write_text(json.dumps(report))
    ended, _, err = llmq("gate", "run", "--rule", "perplexity <= 1.5x base")
    assert ended == 2
    assert f"all tasks failed at {lost}" in err


def test_a_stage_before_the_base_is_not_taken_for_it(run_folder, llmq):
    report = json.loads((run_folder / "report.json").read_text())
    report["stages"][1]["asked"] = {"seconds": 1.0}
    (run_folder / "report.json").write_text(json.dumps(report))
    assert list(results.run(run_folder)) == ["1-quantize.bnb"]


def test_undecided_names_how_many_samples_it_takes(run_folder, llmq):
    ended, out, _ = llmq("gate", "run", "--rule", "acc_norm >= base - 0.1pt")
    assert ended == 3
    assert "400 samples are too few" in out
    assert "to see 1 pt takes" in out
    (found,) = gate.of_run(str(run_folder), ["acc_norm >= base - 0.1pt"])
    assert found.needed > 400
    assert f"about {found.needed:,} would settle it" in out


def a_point_worse(rng, n):
    """Answers of a stage and of its base that is truly one point better: 3 % are gained and 4 % lost."""
    kinds = rng.choice(4, n, p=[0.54, 0.03, 0.04, 0.39])  # both right, gained, lost, neither
    return [accuracy(np.isin(kinds, (0, 1)))], [accuracy(np.isin(kinds, (0, 2)))]


# Of the theory of two shares of one sample: 2.80² (0.03 + 0.04 - 0.01²) / 0.01².
SETTLES_A_POINT = 5487


def test_50_samples_cannot_tell_one_point_and_the_gate_says_how_many_can():
    rng = np.random.default_rng(3)
    found = [one("arc_easy >= base", *a_point_worse(rng, 50)) for _ in range(200)]
    undecided = [v for v in found if v.verdict == "undecided"]
    assert len(undecided) >= 190
    # Those that lie on the bound itself, where none was seen to change, name what it takes to see a point.
    assert all((v.needed or v.fine) > 50 for v in undecided)
    assert np.median([v.fine for v in undecided]) == pytest.approx(SETTLES_A_POINT, rel=0.35)


@pytest.mark.slow
def test_as_many_samples_as_theory_names_settle_it_in_four_of_five_runs():
    rng = np.random.default_rng(4)
    failed = [one("arc_easy >= base", *a_point_worse(rng, SETTLES_A_POINT)).verdict == "fail" for _ in range(200)]
    assert 0.71 <= np.mean(failed) <= 0.89


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ([perplexity([11.5] * 20)], "token_perplexity"),
        ([perplexity([2.0] * 20), accuracy(np.arange(200) % 4 == 0)], "not told from chance: guessing scores 0.25"),
    ],
    ids=["perplexity-above-the-vocabulary", "accuracy-at-chance"],
)
def test_a_broken_base_judges_nothing(base, says):
    rule = "arc_easy >= base - 50pt" if len(base) > 1 else "perplexity <= 2x base"
    found = one(rule, list(base), base)
    assert found.verdict == "base-unhealthy"
    assert says in found.reason
    assert gate.EXIT_CODES[found.verdict] == 1


def test_a_base_of_broken_text_makes_its_size_no_measure_either():
    base = [perplexity([11.5] * 20), size(100)]
    assert one("size <= 0.5x base", [size(10)], base).verdict == "base-unhealthy"
    assert one("size <= 50MB", [size(10)], base).verdict == "pass"


def test_standard_errors_alone_decide_what_they_can():
    def map_of(value, stderr):
        return [Measurement("detection", "map", value, "", "higher", 500, stderr, "")]

    assert one("map >= base - 5pt", map_of(0.40, 0.01), map_of(0.41, 0.01)).verdict == "pass"
    assert one("map >= base", map_of(0.30, 0.01), map_of(0.41, 0.01)).verdict == "fail"
    assert one("map >= 0.95x base", map_of(0.40, 0.01), map_of(0.41, 0.01)).verdict == "undecided"
    unknown = one("map >= base", map_of(0.30, None), map_of(0.41, 0.01))
    assert (unknown.verdict, unknown.ci95) == ("undecided", None)
    assert "standard error" in unknown.reason


@quickly
@given(
    st.lists(st.booleans(), min_size=20, max_size=60),
    st.lists(st.booleans(), min_size=60, max_size=60),
    st.floats(-50, 50),
)
def test_no_verdict_contradicts_its_interval(base, flips, points):
    stage = [b != f for b, f in zip(base, flips, strict=False)]
    found = one(
        f"arc_easy >= base {'+' if points >= 0 else '-'} {abs(points):.3f}pt",
        [accuracy(stage, chance=None)],
        [accuracy(base, chance=None)],
    )
    low, high = found.ci95
    expected = "pass" if low >= found.bound else "fail" if high < found.bound else "undecided"
    assert found.verdict == expected


@quickly
@given(
    st.floats(0.001, 1e6),
    st.sampled_from(["<=", ">=", "<", ">"]),
    st.sampled_from(["{}x base", "base + {}", "base - {}", "{}"]),
)
def test_a_rule_reads_back_what_was_written(number, sign, bound):
    rule = read_rule(f"some metric {sign} {bound.format(repr(number))}")
    assert rule.metric == "some metric"
    assert rule.at_most == ("<" in sign)
    assert rule.strict == ("=" not in sign)
    assert rule.bound == (-number if "-" in bound else number)
    assert rule.is_relative == ("base" in bound)
    assert rule.allows(rule.bound) == (not rule.strict)


BAD = [
    ("gate run --rule|perplexity", "'perplexity'", "write 'METRIC <= 1.03x base'"),
    ("gate run --rule|perplexity <= much", "'much' is no bound", "1.03x base"),
    ("gate run --rule|a = 3", "'a = 3'", "cannot be read"),
    ("gate run --rule|perplexty <= 1x base", "'perplexty'", "did you mean 'perplexity'?"),
    ("gate run --rule|acc >= base --stage|1-quantize.bmb", "'1-quantize.bmb'", "did you mean '1-quantize.bnb'?"),
    ("gate run --rule|e >= base", "'e' can mean 'perplexity token_perplexity', 'size bytes_on_disk'", "name one"),
    ("gate run --rule|size <= base - 1pt", "in 'bytes', not in pt"),
    ("gate run --rule|acc >= 5MB", "in 'share', not in MB"),
    ("gate run --rule|acc >= base - 1", "'acc >= base - 1'", "is a share, at most 1; write 1pt"),
    ("gate run --rule|acc >= 60", "is a share, at most 1; write 60%"),
    ("gate rum --rule|acc >= base", "'rum'", "did you mean 'run'?"),
    ("gate run/0-base --rule|acc >= base", "'run/0-base' is no run"),
    ("gate run", "rule"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b[0])
def test_bad_input_is_one_line(run_folder, llmq, bad):
    line, *says = bad
    words = [
        part.replace("|", " ")
        for part in line.replace("--rule|", "--rule\0").replace("--stage|", "\0--stage\0").split("\0")
    ]
    command, *values = [w.strip() for w in words]
    ended, out, err = llmq(*command.split(), *values)
    assert (ended, out, err.count("\n")) == (2, "", 1)
    assert all(s in err for s in says), err


@pytest.fixture
def job(tiny_llama, tiny_jsonl, tmp_path):
    """A recipe with a gate."""

    def write(*rules: str, evaluate: object = None) -> str:
        tasks = [{"perplexity": {"data": str(tiny_jsonl), "part": "all"}}, "size"] if evaluate is None else evaluate
        plain = {
            "model": {"causal_lm": {"weights": str(tiny_llama)}},
            "steps": [{"quantize.bnb": {"bits": 4}}],
            "evaluate": tasks,
            "gate": list(rules),
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        return str(tmp_path / "job.yaml")

    return write


def test_a_recipe_keeps_its_gate(job):
    text = job("size <= 0.9x base", "perplexity <= 1e9")
    loaded = recipe.load(text)
    assert loaded.gate == ("size <= 0.9x base", "perplexity <= 1e9")
    assert recipe.load(text, ["gate=[size <= 5MB]"]).gate == ("size <= 5MB",)
    assert yaml.safe_load(pipeline.to_yaml(loaded.plain()))["gate"] == list(loaded.gate)


@pytest.mark.parametrize(
    ("rules", "evaluate", "says"),
    [
        (("size <= 0.9x base", "size < small"), None, r"job.yaml:\d+: rule 'size < small': 'small' is no bound"),
        (("size <= 0.9x base",), [], r"job.yaml:\d+: a gate judges measurements"),
    ],
)
def test_a_wrong_gate_is_seen_before_anything_runs(job, rules, evaluate, says):
    with pytest.raises(UserError, match=says):
        recipe.load(job(*rules, evaluate=evaluate))


def test_a_run_ends_with_the_verdict_of_its_gate(job, llmq, tmp_path):
    ended, out, _ = llmq("run", job("bytes_on_disk <= 1MB", "perplexity <= 1e9"), "--out", "run")
    assert ended == 0, out
    assert "pass" in out.splitlines()[-1]
    told = Report.read(tmp_path / "run").gate
    assert (told["verdict"], [r["verdict"] for r in told["rules"]]) == ("pass", ["pass", "pass"])
    for face in ("report.md", "report.html"):
        assert "perplexity &lt;= 1e9" in (tmp_path / "run" / face).read_text().replace(
            "perplexity <=", "perplexity &lt;="
        )
    ended, _, _ = llmq("gate", "run", "--rule", "bytes_on_disk <= 1kB", "--rule", "perplexity <= 1e9")
    assert ended == 1
    # A random model is as perplexed as its vocabulary is large: it can be nobody's measure.
    ended, out, _ = llmq("gate", "run", "--rule", "perplexity <= 1.1x base", "--json")
    assert (ended, json.loads(out)["verdict"]) == (1, "base-unhealthy")


def test_a_gate_that_names_nothing_measured_is_seen_before_the_steps(job, llmq, tmp_path):
    ended, _, err = llmq("run", job("perplexty <= 1e9"), "--out", "run")
    assert ended == 2
    assert "did you mean 'perplexity'?" in err
    assert not (tmp_path / "run/1-quantize.bnb").exists()


@pytest.mark.slow
def test_a_gate_on_what_only_stages_have_and_a_task_that_is_asked_twice(job, llmq, tmp_path):
    questions = [{"lm_eval": {"tasks": ["pydoc_continuation"], "limit": n}} for n in (4, 6)]
    divergence = {"divergence": {"tasks": [], "windows": 8, "window": 16}}
    ended, _, err = llmq("run", job("kl_to_base <= 9", evaluate=[*questions, divergence]), "--out", "run")
    assert ended == 0, err
    found = {(m["task"], m["metric"], m["n"]) for m in Report.read(tmp_path / "run").measurements}
    assert ("pydoc_continuation", "acc", 4) in found
    assert ("pydoc_continuation (lm_eval-2)", "acc", 6) in found


def test_a_probability_is_bounded_by_points_as_the_table_shows_it():
    errors = [0.1, 0.2, 0.3, 0.2] * 100

    def calibration(shift):
        values = tuple(e + shift for e in errors)
        mean = float(np.mean(values))
        return Measurement(
            "accuracy", "calibration_error", mean, "probability", "lower", 400, 0.01, "c", Samples(values)
        )

    found = one("calibration_error <= base + 5pt", [calibration(0.01)], [calibration(0.0)])
    assert (found.verdict, found.points) == ("pass", True)

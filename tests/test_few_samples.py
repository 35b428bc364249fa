"""What has samples is judged by its samples: no accident is certain, and few samples decide nothing."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from run_folders import accuracy, perplexity, size, speed, write_run
from scipy import stats

from llmq import pipeline, recipe
from llmq.artifact import Artifact, Stage
from llmq.errors import UserError
from llmq.guarded.weights import stored_as
from llmq.judge import comparisons as compare
from llmq.judge import gate, protocols
from llmq.report import Report, facts, markdown, screen
from llmq.rules import read_rule
from llmq.source import Source
from llmq.statistics import compare as statistics
from llmq.statistics import figures, proportions
from llmq.statistics.estimates import alone, difference, ratio
from llmq.statistics.proportions import Table
from llmq.types import Measurement, Samples


def judged(rule: str, stage, base):
    """The verdict on one rule."""
    (found,) = gate.judge([read_rule(rule)], "1-x", stage, base)
    return found


def graded(values, metric="f1", better="higher", **more):
    """Scores from 0 to 1."""
    samples = Samples(tuple(map(float, values)), **more)
    mean, stderr = figures.ratio_stderr(samples.values)
    return Measurement("qa", metric, mean, "share", better, len(samples.values), stderr, "c", samples)


def flips(values):
    return graded(values, "flips", "lower")


def turned(found):
    """The same figures, where the other direction is the better one."""
    return [replace(m, better={"higher": "lower", "lower": "higher"}[m.better]) for m in found]


CERTAIN_BY_ACCIDENT = [
    ("acc >= 90%", [accuracy([1] * 5)], [accuracy([1] * 5)]),
    ("acc >= 50%", [accuracy([1] * 7)], [accuracy([1] * 7)]),
    ("flips <= 1%", [flips([0] * 5)], []),
    ("flips <= 1%", [flips([0] * 100)], []),
    ("acc >= base - 1pt", [accuracy([1, 1, 0], chance=None)], [accuracy([1, 1, 0], chance=None)]),
    ("acc >= base - 1pt", [accuracy([1] * 20, chance=None)], [accuracy([1] * 20, chance=None)]),
    ("acc >= 0.99x base", [accuracy([1] * 20, chance=None)], [accuracy([1] * 20, chance=None)]),
    ("f1 >= base - 1pt", [graded([0.5] * 8)], [graded([0.5] * 8)]),
    ("f1 >= base + 45pt", [graded([1.0] * 8)], [graded([0.5] * 8)]),
    ("f1 >= 0.99x base", [graded([0.5, 0.7] * 4)], [graded([0.5, 0.7] * 4)]),
    ("f1 >= 99%", [graded([1.0] * 20)], []),
    ("psnr >= 30", [replace(graded([42.0] * 64), metric="psnr", unit="dB")], []),
    ("perplexity <= 1.0x base", [perplexity([2.0, 2.1, 2.2])], [perplexity([2.0, 2.1, 2.2])]),
    ("speed >= 1.1x base", [speed([20.0] * 12)], [speed([10.0] * 12)]),
    ("acc >= 90%", [replace(accuracy([1] * 5), samples=None, stderr=0.0)], []),
    ("acc >= 90%", [replace(accuracy([1] * 20), samples=None, stderr=0.0)], []),
    (
        "acc >= base - 1pt",
        [replace(accuracy([1] * 20, chance=None), samples=None, stderr=0.0)],
        [replace(accuracy([1] * 20, chance=None), samples=None, stderr=0.0)],
    ),
    ("rate >= 2", [Measurement("t", "rate", 3.0, "/s", "higher", 9, 0.0, "c")], []),
]


@pytest.mark.parametrize(("rule", "stage", "base"), CERTAIN_BY_ACCIDENT)
def test_no_gate_is_passed_or_failed_by_an_accident(rule, stage, base):
    found = judged(rule, stage, base)
    assert found.verdict == "undecided"
    if found.ci95:
        assert found.ci95[0] < found.ci95[1]
        assert found.needed > found.n
    else:
        assert found.reason
    contrary = rule.replace("<=", "\0").replace(">=", "<").replace("\0", ">")
    assert judged(contrary, turned(stage), turned(base)).verdict == "undecided", "nor is its contrary"


@pytest.mark.parametrize(("rule", "stage", "base"), CERTAIN_BY_ACCIDENT)
def test_no_comparison_is_decided_by_an_accident(rule, stage, base):
    for m, b in zip(stage, base, strict=False):
        found = statistics.compare(m, b)
        assert found.verdict in ("undecided", "same") or found.n >= 8
        if found.n and found.n < 8:
            assert (found.verdict, found.p, found.needed) == ("undecided", None, 8)
            assert found.reason.endswith("8 may")
        if found.ci95:
            assert found.ci95[0] < found.ci95[1]


@pytest.mark.parametrize(
    ("rule", "n", "verdict"),
    [("acc >= 90%", 35, "pass"), ("acc >= 90%", 34, "undecided"), ("acc <= 10%", 35, "fail"), ("acc > 40%", 8, "pass")],
)
def test_all_right_passes_where_wilsons_interval_does(rule, n, verdict):
    low = stats.binomtest(n, n).proportion_ci(method="wilson").low
    assert (low >= 0.9) == (n >= 35)
    right = [accuracy([1] * n)]
    found = judged(rule, turned(right) if "<" in rule else right, [])
    assert (found.verdict, found.ci95[0]) == (verdict, pytest.approx(low))


@pytest.mark.parametrize("n", [8, 20, 39])
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_where_all_that_changed_was_lost_the_exact_bound_holds(n, lost):
    table = Table(n - lost, 0, lost, 0)
    exact = stats.binomtest(lost, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert proportions.at_most(lost, n) == pytest.approx(exact)
    low, high = proportions.difference(table)[1]
    assert low <= -exact * (1 - 1e-9)
    assert proportions.ratio(table)[1][0] <= 1 - exact + 1e-12
    turned = proportions.difference(Table(n - lost, lost, 0, 0))[1]
    assert turned == pytest.approx((-high, -low))


def test_no_flip_of_n_leaves_room_for_three_of_n():
    assert proportions.at_most(0, 300) == pytest.approx(3 / 300, rel=0.01)
    found = alone(Samples((0.5,) * 300))
    assert found.interval == pytest.approx((0.5 * 0.05 ** (1 / 300), 0.5 * 0.05 ** (1 / 300) + 1 - 0.05 ** (1 / 300)))


def test_few_documents_leave_room_for_one_that_is_lost_whole():
    scores = np.random.default_rng(8).normal(0.9, 0.01, 20)
    stderr = (2 - 22 * (scores.sum() / 22 - 20 * 0.9 / 22) ** 2) ** 0.5 / 22
    found = difference(Samples(tuple(scores)), Samples((0.9,) * 20))
    assert found.high - found.low == pytest.approx(2 * proportions.Z * stderr, rel=1e-3)
    # Alone: one document of 0 and one of 1 more.
    more = np.append(scores, (0.0, 1.0))
    found = alone(Samples(tuple(scores)))
    assert found.low == pytest.approx(more.mean() - proportions.Z * more.std() / 22**0.5)
    many = np.random.default_rng(8).normal(0.9, 0.01, 50)
    found = difference(Samples(tuple(many)), Samples((0.9,) * 50))
    assert found.high - found.low < 2.2 * stats.t.ppf(0.975, 49) * stats.sem(many)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_pairs_that_all_differ_alike_are_bounded_in_closed_form(shift):
    base = np.random.default_rng(0).uniform(0, 0.5, 12)
    found = difference(Samples(tuple(base + shift)), Samples(tuple(base)))
    u = 1 - 0.05 ** (1 / 12)
    assert found.interval == pytest.approx(((1 - u) * shift - u, (1 - u) * shift + u))
    assert (found.p < 0.05) == (found.low > 0)
    assert found.value == pytest.approx(shift)


def test_two_pairs_that_differ_alike_are_no_interval():
    a, b = Samples((0.5, 0.9)), Samples((0.0, 0.4))
    assert difference(a, b) is None
    assert alone(Samples((0.5, 0.5))) is None
    assert statistics.compare(graded(a.values), graded(b.values)).verdict == "undecided"


def test_documents_that_share_samples_count_once():
    rng = np.random.default_rng(1)
    clusters = tuple(int(i) for i in np.repeat(np.arange(5), 20))
    base = rng.uniform(0, 0.5, 100)
    stage = base + np.repeat(rng.normal(0.4, 0.01, 5), 20)
    a, b = (graded(x, clusters=clusters) for x in (stage, base))
    found = statistics.compare(a, b)
    assert (found.n, found.verdict) == (5, "undecided")
    assert judged("f1 >= base", [a], [b]).n == 5
    # Of twelve documents of each one sample right the share's bound speaks of twelve, not of 240.
    of_twelve = tuple(int(i) for i in np.repeat(np.arange(12), 20))
    all_right = alone(Samples((1.0,) * 240, clusters=of_twelve))
    assert (all_right.n, all_right.low) == (12, pytest.approx(0.05 ** (1 / 12)))
    renamed = tuple(100 - c for c in clusters)
    assert difference(Samples(tuple(stage), clusters=clusters), Samples(tuple(base), clusters=renamed)) is not None


def test_rounding_is_no_scatter():
    base = np.random.default_rng(2).uniform(1000, 2000, 50)
    found = difference(Samples(tuple(base + 0.1)), Samples(tuple(base)))
    assert found.high - found.low > 10, "bounded by how far unrelated samples lie apart"


@pytest.mark.parametrize(
    ("right", "n", "verdict", "says"),
    [
        (2, 3, "undecided", "3 samples decide nothing; 8 may"),
        (1, 4, "undecided", "4 samples decide nothing; 8 may"),
        (4, 8, "undecided", "cannot show that the base itself is sound"),
        (50, 200, "base-unhealthy", "the base's own acc of 0.25 (200 samples) is not told from chance"),
        (40, 200, "base-unhealthy", "the base's own"),
        (100, 200, "pass", ""),
    ],
)
def test_a_base_is_broken_only_where_enough_samples_say_so(right, n, verdict, says):
    base = accuracy([1] * right + [0] * (n - right))
    found = judged("acc >= base - 20pt", [accuracy(base.samples.values)], [base])
    assert (found.verdict, says in found.reason) == (verdict, True)


def test_the_perplexity_of_few_windows_breaks_no_base_for_other_rules():
    base = [perplexity([11.5, 11.4]), size(100)]
    assert judged("size <= 0.5x base", [size(10)], base).verdict == "pass"
    assert judged("perplexity <= 2x base", [perplexity([11.5, 11.4])], base).verdict == "undecided"


# Direction


def test_a_figure_of_unknown_direction_has_no_verdict_no_gate_and_no_mark(tmp_path, capsys):
    rng = np.random.default_rng(3)
    base, stage = (graded(x, better="unknown") for x in (rng.uniform(0, 0.5, 50), rng.uniform(0.5, 1, 50)))
    same = graded(base.samples.values, better="unknown")
    for m in (stage, same, replace(stage, exact=True)):
        found = statistics.compare(m, replace(base, exact=m.exact))
        assert found.verdict == "unknown"
        assert statistics.corrected([found])[0] == found
    for rule in ("f1 >= base", "f1 >= 10%", "f1 <= 1.1x base"):
        with pytest.raises(UserError, match="direction unknown"):
            judged(rule, [stage], [base])
    with pytest.raises(UserError, match="unlike directions"):
        judged("f1 >= base", [replace(stage, better="higher")], [base])
    folder = write_run(tmp_path / "run", {"0-base": [base, size(2)], "1-x": [stage, size(1)]})
    report = Report.read(folder)
    (line,) = (line for line in markdown.table(report).splitlines() if "| f1" in line)
    assert not set(line) & set("↑↓▲▼=?")
    screen.show(report)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "f1" in line)
    assert not set(line) & set("↑↓▲▼=?")


# Documents


def of_documents(answers):
    """Answers by the documents' ids."""
    return replace(
        accuracy(answers.values(), chance=None),
        samples=Samples(tuple(map(float, answers.values())), ids=tuple(answers)),
    )


@pytest.mark.parametrize("shift", [0, 20], ids=["fewer", "others"])
def test_pairs_are_the_documents_that_both_scored(shift):
    """Where no answer changed none is gained or lost, whichever documents one side left unscored."""
    rng = np.random.default_rng(4)
    right = {f"doc{i}": int(rng.random() < 0.5) for i in range(200)}
    base = of_documents({k: v for i, (k, v) in enumerate(right.items()) if i < 180})
    stage = of_documents({k: v for i, (k, v) in enumerate(right.items()) if i >= shift and i < 190})
    found = statistics.compare(stage, base)
    assert (found.n, found.only_stage, found.only_base) == (180 - shift, 10, shift)
    assert (found.difference, found.ratio, found.verdict, found.p) == (0.0, 1.0, "same", 1.0)
    told = judged("acc >= base - 5pt", [stage], [base])
    assert (told.verdict, told.n, told.only_stage, told.only_base) == ("pass", 180 - shift, 10, shift)


def test_how_many_were_left_unscored_is_no_part_of_the_protocol():
    protocol = "lm-eval 0.4.13, task version 1, hash a, 0-shot"
    right = {f"d{i}": i % 2 for i in range(50)}
    base, stage = of_documents(right), of_documents({k: v for k, v in right.items() if k not in ("d3", "d5")})
    base = replace(base, convention=protocol)
    stage = replace(stage, convention=f"{protocol}, 2 of 50 questions left unscored")
    assert protocols.refused(stage, base) == ""
    assert statistics.compare(stage, base).only_base == 2
    assert judged("acc >= base - 9pt", [stage], [base]).verdict == "pass"
    unnamed = [replace(m, samples=replace(m.samples, ids=None)) for m in (stage, base)]
    assert "left unscored" in protocols.refused(*unnamed)
    assert "hash b" in protocols.refused(replace(stage, convention=protocol.replace("hash a", "hash b")), base)


def test_the_order_of_documents_and_one_asked_twice_change_nothing():
    ids = tuple(f"d{i % 30}" for i in range(40))
    values = tuple(float(i % 3 == 0) for i in range(40))
    order = np.random.default_rng(5).permutation(40)
    order = sorted(order, key=lambda i: i >= 30)  # the first turn of a document stands before its second
    turned = Samples(tuple(values[i] for i in order), ids=tuple(ids[i] for i in order))
    found = statistics.compare(*(replace(accuracy(s.values), samples=s) for s in (turned, Samples(values, ids=ids))))
    assert (found.n, found.only_stage, found.only_base, found.verdict) == (40, 0, 0, "same")


@pytest.mark.parametrize(
    ("stage", "base", "says"),
    [
        (accuracy([1, 0] * 50), accuracy([1, 0] * 60), "unlike samples, 100 against 120"),
        (of_documents({"a": 1, "b": 0}), of_documents({"c": 1, "d": 0}), "no document stands on both sides"),
        (graded([0.5] * 9), graded([0.5] * 9, statistic="exp"), "do not pair"),
        (graded([0.5] * 9, clusters=(0,) * 9), graded([0.5] * 9), "share their documents in other ways"),
    ],
)
def test_samples_that_do_not_pair_end_nothing_and_are_told(stage, base, says, tmp_path, capsys):
    assert says.split(",")[0] in statistics.compare(stage, base).reason or "do not pair" in says or "unlike" in says
    rule = f"{stage.metric} >= base"
    found = judged(rule, [stage], [base])
    assert (found.verdict, found.ci95) == ("undecided", None)
    assert says in found.reason
    folder = write_run(tmp_path / "run", {"0-base": [base, size(2)], "1-x": [stage, size(1)]})
    report = Report.read(folder)
    assert [c["metric"] for c in report.comparisons] == ["bytes_on_disk"]
    (refused,) = report.refused
    assert says in refused["reason"]
    assert f"not compared: {refused['reason']}" in markdown.draw(report)
    screen.show(report)
    assert "not compared" in capsys.readouterr().out
    (told,) = compare.side_by_side(compare.targets([str(folder)])).refusals
    assert says in told.reason


def test_left_out_documents_are_counted_on_every_face(tmp_path, capsys):
    base = of_documents({f"d{i}": i % 2 for i in range(50)})
    stage = of_documents({f"d{i}": i % 2 for i in range(3, 55)})
    folder = write_run(tmp_path / "run", {"0-base": [base], "1-x": [stage]})
    said = "judged on the 47 documents that both scored; left out: 5 that only the stage scored, 3 that only the base"
    report = Report.read(folder)
    assert said in markdown.draw(report)
    screen.show(report)
    assert said in capsys.readouterr().out
    screen.show_comparison(compare.side_by_side(compare.targets([str(folder)])))
    told = gate.as_data(gate.of_run(str(folder), ["acc >= base"]))
    screen.show_gate(told)
    assert capsys.readouterr().out.count(said) == 2
    json.dumps(told, allow_nan=False)


def test_too_few_samples_are_told_on_every_face(tmp_path, capsys):
    base, stage = accuracy([1, 1, 1, 0, 0]), accuracy([1, 1, 1, 1, 0])
    peak = Measurement("speed", "peak_memory", 1e9, "bytes", "lower", 1, None, "c", Samples((1e9,)))
    folder = write_run(tmp_path / "run", {"0-base": [base, peak], "1-x": [stage, peak]})
    screen.show(Report.read(folder))
    screen.show_comparison(compare.side_by_side(compare.targets([str(folder)])))
    told = capsys.readouterr().out
    assert told.count("arc_easy acc: 5 samples decide nothing; 8 may") == 2
    assert "1 sample" not in told
    screen.show_gate(gate.as_data(gate.of_run(str(folder), ["acc >= base", "peak_memory <= base"])))
    told = capsys.readouterr().out
    assert "5 samples decide nothing; 8 may" in told
    assert "1 sample decides nothing; 8 may" in told


# One run, unlike conditions


@pytest.mark.parametrize(
    "other",
    ["input 32 float32, 2 threads, cuda:0", "input 32 bfloat16, 2 threads, cpu", "input 32 float32, 1 threads, cpu"],
)
def test_unlike_conditions_are_refused_within_one_run(tmp_path, other):
    rates = np.random.default_rng(6).normal(10, 0.1, 12)
    base = replace(speed(rates), convention="input 32 float32, 2 threads, cpu")
    stage = replace(speed(3 * rates), convention=other)
    folder = write_run(tmp_path / "run", {"0-base": [base, size(2)], "1-x": [stage, size(1)]})
    (refused,) = Report.read(folder).refused
    assert refused["metric"] == "decode_tokens_per_second"
    assert "unlike protocols" in refused["reason"]
    (told,) = compare.side_by_side(compare.targets([str(folder)])).refusals
    assert told.reason == refused["reason"]
    with pytest.raises(UserError, match="cannot be held against the base: unlike protocols"):
        gate.of_run(str(folder), ["decode >= 1.2x base"])
    assert gate.of_run(str(folder), ["decode >= 20"])[0].verdict == "pass"


def test_a_graph_is_compared_with_the_network_that_it_was_made_of(tmp_path):
    rates = np.random.default_rng(6).normal(10, 0.1, 12)
    stages = {
        name: [replace(speed(rate * rates), convention=f"input 32 float32, 2 threads, {where}")]
        for name, rate, where in (
            ("0-base", 1, "cpu, torch in float32"),
            ("1-quantize.int8", 3, "cpu, openvino in float32"),
            ("2-quantize.int8", 3, "cpu, openvino in bfloat16"),
        )
    }
    report = Report.read(write_run(tmp_path / "run", stages))
    assert [(c["stage"], c["verdict"]) for c in report.comparisons] == [("1-quantize.int8", "better")]
    assert [(r["stage"], "bfloat16" in r["reason"]) for r in report.refused] == [("2-quantize.int8", True)]
    text = markdown.draw(report)
    for stage, where in (("0-base", "torch in float32"), ("1-quantize.int8", "openvino in float32")):
        assert f"{stage}: input 32 float32, 2 threads, cpu, {where}" in text


# The dtype of what is stored


def stored(folder, dtype, packed=False):
    """A weight file of one tensor, and one of packed bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {"a": torch.zeros(64, dtype=dtype)}
    save_file(tensors | ({"b": torch.zeros(4096, dtype=torch.uint8)} if packed else {}), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("base", "stage", "packed", "says"),
    [
        ("float32", "bfloat16", False, "stored as bfloat16, the base as float32"),
        ("float32", "float32", True, "stored as uint8 and float32, the base as float32"),
        ("bfloat16", "bfloat16", False, ""),
        ("bfloat16", "bfloat16", True, ""),
        ("bfloat16", "float32", False, "stored as float32, the base as bfloat16"),
        ("bfloat16", "float16", True, ""),
    ],
)
def test_a_ratio_of_sizes_names_the_dtypes_where_they_differ(tmp_path, capsys, base, stage, packed, says):
    import torch

    places = stored(tmp_path / "b", getattr(torch, base)), stored(tmp_path / "s", getattr(torch, stage), packed)
    stages = [
        Stage(name, Artifact(None, place), (size(mb),))
        for name, place, mb in zip(("0-base", "1-x"), places, (2, 1), strict=True)
    ]
    report = Report.of({}, {"data_sha256": {}, "libraries": {}}, stages, "0-base")
    text = markdown.draw(report)
    assert text.count(says) == 2 if says else "stored as" not in text
    assert math.isclose(report.comparisons[0]["ratio"], 0.5)
    run = write_run(tmp_path / "run", {s.name: s.measurements for s in stages})
    (run / "report.json").write_text(json.dumps(asdict(report)))
    screen.show_comparison(compare.side_by_side(compare.targets([str(run)])))
    told = capsys.readouterr().out
    assert f"1-x: {says}" in told if says else "stored as" not in told
    stored_of = compare.side_by_side(compare.targets([str(run)])).plain()["stored"]
    assert base in stored_of["0-base"]
    in_memory, parameters = (replace(size(2), metric=m, unit=u) for m, u in (("bytes_in_memory", "bytes"), ("n", "1")))
    for rule, m, is_told in (
        ("size <= 0.5x base", size(1), True),
        ("bytes_in_memory <= 0.9x base", in_memory, True),
        ("size <= 2 MB", size(1), False),
        ("n <= base", parameters, False),
    ):
        judged_so = gate.judge([read_rule(rule)], "1-x", [m], [m, size(2)][:1], says)
        assert (says in facts.sentence(asdict(judged_so[0]))) == (is_told or not says)
    screen.show_gate(gate.as_data(gate.of_run(str(run), ["size <= 0.5x base"])))
    told = capsys.readouterr().out
    assert says in told if says else "stored as" not in told


def test_the_dtype_of_a_graph_is_that_of_its_constants(tmp_path):
    layers = "".join(
        f'<layer id="{i}" name="{i}" type="Const" version="opset1">\n\t<data element_type="{dtype}" shape="{size}" '
        f'offset="0" size="{size}" />\n</layer><layer id="9{i}" type="Convert"><data destination_type="f32" /></layer>'
        for i, (dtype, size) in enumerate((("i64", 16), ("f16", 600), ("f32", 40)))
    )
    (tmp_path / "model.xml").write_text(f"<net><layers>{layers}</layers></net>")
    assert stored_as([tmp_path / "model.xml", tmp_path / "model.bin"]) == "float16"
    (tmp_path / "model.xml").write_text(f"<net><layers>{layers.replace('f16', 'i8')}</layers></net>")
    assert stored_as([tmp_path / "model.xml"]) == "int8 and float32"


def test_a_ratio_of_shares_of_none_has_no_endless_interval():
    found = ratio(Samples((1.0,) * 9 + (0.0,)), Samples((0.0,) * 9 + (1.0,)))
    assert found is None or math.isfinite(found.high)


def test_losses_of_a_broken_model_have_no_interval_and_no_traceback():
    base = tuple(np.random.default_rng(7).normal(2, 0.1, 8))
    broken = (*base[:7], 600.0)
    a, b = (Samples(values, statistic="exp") for values in (broken, base))
    assert ratio(a, b) is None
    shifted = Samples(tuple(x + 701 for x in base), statistic="exp")
    assert (ratio(shifted, b), difference(shifted, b)) == (None, None)


@pytest.mark.slow
def test_no_figure_of_an_ordinary_run_is_refused(tiny_llama, tmp_path):
    steps = [{"prune.magnitude": {"sparsity": 0.5}}, "quantize.bnb"]
    tasks = [
        "size",
        {"perplexity": {"window": 32, "limit": 10}},
        {"speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 8}},
        {"lm_eval": {"tasks": ["pydoc_continuation"], "limit": 10}},
        {"divergence": {"windows": 8, "window": 16, "limit": 10}},
    ]
    plain = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": steps, "evaluate": tasks}
    report = pipeline.run(recipe.parse(Source("x", plain), "x"), tmp_path / "run")
    assert report.refused == []
    assert {s["stored"] for s in report.stages} >= {"bfloat16"}
    told = {(c["stage"], c["metric"]): c for c in report.comparisons}
    assert {name for name, _ in told} == {"1-prune.magnitude", "2-quantize.bnb"}
    assert told["2-quantize.bnb", "bytes_on_disk"]["ci95"][0] == told["2-quantize.bnb", "bytes_on_disk"]["ci95"][1]
    assert all(c["ci95"][0] < c["ci95"][1] for (_, m), c in told.items() if c["ci95"] and "bytes" not in m and c["n"])
    assert told["2-quantize.bnb", "peak_memory"]["verdict"] == "undecided"

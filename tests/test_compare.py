"""Results side by side: what is compared, what is refused and why, and that lm-eval's own files are read."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import CPU, base_of
from run_folders import accuracy, perplexity, size, speed, write_run

from llmq import pipeline, plugin
from llmq.errors import UserError
from llmq.files import bundled
from llmq.judge import comparisons as compare
from llmq.judge import results


def figures(seed: int, shift: float, **more):
    """A perplexity, a size, an accuracy and a speed; those of one seed pair."""
    rng = np.random.default_rng(seed)
    losses, right, drift = rng.normal(2, 0.3, 100), rng.random(200) < 0.6, rng.normal(0, 0.02, 12)
    own = np.random.default_rng(1000 + int(100 * shift))
    return [
        perplexity(losses + shift + own.normal(0, 0.02, 100) * (shift != 0), **more),
        size(100 - 100 * shift),
        accuracy(right & (own.random(200) >= shift)),
        speed(30 * np.exp(drift + own.normal(0, 0.02, 12))),
    ]


@pytest.fixture
def runs(tmp_path):
    """Two runs of the same tasks."""
    for name, shift in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / name, {"0-base": figures(0, 0.0), "1-x": figures(0, shift / 2), "2-y": figures(0, shift)})
    return tmp_path


def compared(*targets):
    """(result, metric) -> comparison."""
    found = compare.side_by_side(compare.targets([str(t) for t in targets]))
    return {(name, c.metric): c for name, c in found.comparisons}, found


def test_a_single_run_shows_its_stages(runs):
    pairs, found = compared(runs / "a")
    assert [r.name for r in found.results] == ["0-base", "1-x", "2-y"]
    assert {name for name, _ in pairs} == {"1-x", "2-y"}
    assert pairs["2-y", "decode_tokens_per_second"].ci95 is not None, "the clocks of one run were taken in turn"
    assert pairs["2-y", "token_perplexity"].verdict == "worse"
    assert pairs["2-y", "bytes_on_disk"].verdict == "better"


def test_of_several_runs_the_last_stages_are_compared(runs):
    pairs, found = compared(runs / "a", runs / "b")
    assert [r.name for r in found.results] == ["a/2-y", "b/2-y"]
    low, high = pairs["b/2-y", "token_perplexity"].ratio_ci95
    assert low < np.exp(0.1) < high
    (refused,) = found.refusals
    assert refused.metric == "decode_tokens_per_second"
    assert "not in turn" in refused.reason


def test_a_stage_can_be_named_by_its_folder(runs):
    pairs, found = compared(runs / "a" / "1-x", runs / "b" / "1-x", runs / "a" / "2-y")
    assert len(found.results) == 3
    assert len({r.name for r in found.results}) == 3
    assert pairs["2-y" if ("2-y", "token_perplexity") in pairs else str(runs / "a/2-y"), "token_perplexity"]


def test_a_run_beside_itself_elsewhere_differs_by_nothing(runs):
    write_run(runs / "again", {"0-base": figures(0, 0.0), "2-y": figures(0, 0.1)})
    pairs, _ = compared(runs / "a", runs / "again")
    same = {metric: c for (_, metric), c in pairs.items()}
    assert {c.verdict for c in same.values()} == {"same"}
    assert all(c.difference == 0 for c in same.values())
    assert same["token_perplexity"].ci95 == (0, 0)
    assert same["acc"].ci95[1] == pytest.approx(1 - 0.05 ** (1 / 200)), "200 answers of which none changed"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            [perplexity([2.0] * 100, convention="1024-token windows")],
            "'1024-token windows' against '512-token windows'",
        ),
        ([perplexity([2.0] * 100, convention="512-token windows; pydoc held_out, sha256 b")], "sha256 b"),
        ([accuracy([1, 0] * 100, convention="hash b, 0-shot")], "unlike protocols, 'hash b' against 'hash a'"),
        ([accuracy([1, 0] * 100, convention="lm-eval 0.5, task version 2, hash a, 0-shot")], "'task version 2'"),
        ([accuracy([1, 0] * 50)], "unlike samples, 100 against 200"),
        ([accuracy([1, 0] * 100, task="arc_hard")], "share no figure (arc_hard against perplexity, size, arc_easy"),
    ],
    ids=["protocol", "data", "questions", "version", "samples", "tasks"],
)
def test_unlike_figures_are_refused_with_the_reason(runs, other, says, llmq):
    write_run(runs / "other", {"0-base": other})
    ended, out, err = llmq("compare", "a", "other/0-base")
    assert (ended, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_the_version_of_the_harness_alone_is_no_reason(runs):
    conventions = (f"lm-eval 0.4.{v}, task version 1, hash a, 0-shot" for v in (12, 13))
    for name, convention in zip(("old", "new"), conventions, strict=True):
        write_run(runs / name, {"0-base": [accuracy([1, 0, 1, 1] * 20, convention=convention)]})
    pairs, found = compared(runs / "old" / "0-base", runs / "new" / "0-base")
    assert not found.refusals
    assert [c.verdict for c in pairs.values()] == ["same"]


def test_what_can_be_compared_is_and_the_rest_is_told(runs, llmq):
    write_run(runs / "other", {"0-base": [*figures(0, 0.1, convention="another")[:3]]})
    ended, out, _ = llmq("compare", "a", "other/0-base")
    assert ended == 0
    assert "not compared: 0-base: perplexity token_perplexity: unlike protocols" in out
    assert "bytes_on_disk (MB)" in out


def test_one_table_on_a_terminal_and_as_data(runs, llmq):
    ended, out, err = llmq("compare", "a", "b")
    assert (ended, err) == (0, "")
    assert "a/2-y" in out
    assert "Holm" in out
    row = next(line for line in out.splitlines() if "token_perplexity" in line)
    assert "▼" in row
    assert "[+" in row
    told = json.loads(llmq("compare", "a", "b", "--json")[1])
    assert told["against"] == "a/2-y"
    assert {c["metric"] for c in told["comparisons"]} == {"token_perplexity", "bytes_on_disk", "acc"}
    assert all(c["p_holm"] >= c["p"] for c in told["comparisons"] if c["p"] is not None)
    assert len(told["refused"]) == 1


@pytest.mark.parametrize(
    ("words", "files", "says"),
    [
        ("a c", {}, "there is no run, stage or result file 'c'"),
        ("a/0-base", {}, "'a/0-base' is one result; name another"),
        ("a a", {}, "'a' is named twice"),
        ("a empty", {"empty/x": ""}, "'empty' is no run or stage of llmq, and holds no results_*.json"),
        ("a half", {"half/recipe.yaml": ""}, "without a report; finish it with"),
        ("a r.json", {"r.json": "{}"}, "'r.json' is no result file of lm-eval"),
        ("a r.json", {"r.json": "{\n,"}, "r.json:2: not JSON"),
        ("a two", {"two/results_1.json": "{}", "two/m/results_2.json": "{}"}, "'two' holds 2 result files; name one"),
        ("a c/0-base", {"c/report.json": "[]"}, "there is no run"),
        ("a c", {"c/report.json": "[]"}, "'c/report.json' is no report of llmq"),
        ("a c", {"c/report.json": '{"measurements": []}'}, "nothing was measured"),
    ],
)
def test_bad_input_is_one_line(runs, llmq, words, files, says):
    for name, text in files.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(text)
    ended, out, err = llmq("compare", *words.split())
    assert (ended, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_run_of_before_the_clocks_were_kept_shows_their_figures(runs):
    for stage in ("0-base", "2-y"):
        (runs / "a" / stage / "clocks.json").unlink()
    pairs, _ = compared(runs / "a")
    assert pairs["2-y", "decode_tokens_per_second"].ci95 is not None, "of standard errors alone"


def harness_file(folder, answers, *, samples=True, version=1, **more):
    """A result file as lm-eval writes it, its samples beside it, with `more` entries."""
    n, acc = len(answers), float(np.mean(answers))
    spread = float(np.std(answers, ddof=1) / n**0.5)
    data = {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": acc, "acc_stderr,none": spread}},
        "versions": {"arc_easy": version},
        "n-shot": {"arc_easy": 0},
        "n-samples": {"arc_easy": {"original": n, "effective": n}},
        "higher_is_better": {"arc_easy": {"acc": True}},
        "config": {"limit": None},
        "lm_eval_version": "0.4.13",
        "model_name": "org/some-model",
        **more,
    }
    folder.mkdir(parents=True)
    (folder / "results_2026-01-01T00-00-00.000001.json").write_text(json.dumps(data))
    rows = (
        {
            "doc_id": i, "filter": "none", "acc": float(a), "arguments": {f"gen_args_{k}": {} for k in range(4)},
            "doc_hash": str(i), "prompt_hash": "p", "target_hash": "t",
        }
        for i, a in enumerate(answers)
    )  # fmt: skip
    if samples:
        text = "".join(json.dumps(r) + "\n" for r in reversed(list(rows)))
        (folder / "samples_arc_easy_2026-01-01T00-00-00.000001.jsonl").write_text(text)
    return folder


def test_two_result_files_of_lm_eval_pair_by_their_questions(tmp_path):
    right = np.random.default_rng(0).random(300) < 0.5
    worse = right & (np.arange(300) % 10 != 0)
    pairs, found = compared(harness_file(tmp_path / "x", right), harness_file(tmp_path / "y" / "m", worse))
    (c,) = pairs.values()
    assert c.verdict == "worse"
    assert c.p == pytest.approx(2 * 0.5 ** int(right.sum() - worse.sum())), "McNemar: all that changed was lost"
    assert found.results[0].measurements[0].chance == 0.25


def test_without_samples_the_standard_errors_are_taken(tmp_path):
    right = np.random.default_rng(0).random(300) < 0.5
    pairs, _ = compared(*(harness_file(tmp_path / n, right, samples=False) for n in "xy"))
    (c,) = pairs.values()
    assert c.verdict == "undecided"
    assert c.ci95[1] == pytest.approx(1.96 * 2**0.5 * 0.5 / 300**0.5, rel=0.01)


def test_other_versions_of_a_task_are_refused(tmp_path):
    files = [harness_file(tmp_path / str(v), [1, 0] * 50, version=v) for v in (1, 2)]
    with pytest.raises(UserError, match="'task version 2' against 'task version 1'"):
        compared(*files)


SHOTS = {"n-shot": {"arc_easy": 5}}


@pytest.mark.parametrize(
    "other",
    [
        {"configs": {"arc_easy": {"doc_to_text": "Q: {{question}}"}}},
        {"configs": {"arc_easy": {"target_delimiter": ""}}},
        {"n-samples": {"arc_easy": {"original": 100, "effective": 50}}},
        {**SHOTS, "config": {"fewshot_seed": 1}},
        {**SHOTS, "fewshot_as_multiturn": True},
    ],
)
def test_without_samples_other_questions_are_known_by_their_settings(other, tmp_path):
    told = SHOTS if "n-shot" in other else {}
    alike = compared(*(harness_file(tmp_path / n, [1, 0] * 50, samples=False, **told) for n in "xy"))
    assert alike[0]
    files = [harness_file(tmp_path / n, [1, 0] * 50, samples=False, **m) for n, m in (("a", told), ("b", other))]
    with pytest.raises(UserError, match="unlike protocols, 'hash without samples "):
        compared(*files)


def test_a_figure_that_only_one_result_has_is_told(runs, llmq):
    write_run(runs / "less", {"0-base": figures(0, 0.0)[1:3]})
    for targets, has in ((("a", "less"), "a/2-y"), (("less", "a"), "a/2-y")):
        ended, out, _ = llmq("compare", *targets)
        assert ended == 0
        assert f"perplexity token_perplexity: only {has} has it" in out
        told = json.loads(llmq("compare", *targets, "--json")[1])["refused"]
        assert {"perplexity", "speed"} == {r["task"] for r in told if r["reason"] == f"only {has} has it"}


@pytest.mark.parametrize("twice", [("a", "a/"), ("a", "./a"), ("a/2-y", "a"), ("a/1-x", "b", "b/../a/1-x")])
def test_one_result_by_two_names_is_not_compared_with_itself(runs, twice, llmq):
    ended, out, err = llmq("compare", *twice)
    assert (ended, out) == (2, "")
    assert "are one result; name another" in err


def test_a_share_differs_by_points_here_as_in_the_report(runs, llmq):
    right = np.arange(200) % 4 > 0
    write_run(runs / "one", {"0-base": [accuracy(right)], "1-x": [accuracy(right & (np.arange(200) % 8 > 1))]})
    shown = [llmq(command, "one")[1] for command in ("show", "compare")]
    assert all("-12.50 pt [" in text for text in shown)


@pytest.mark.parametrize("version", [99, 99.0, "3", True])
@pytest.mark.parametrize("command", [("show",), ("compare",), ("gate", "--rule", "size <= 1x base")])
def test_a_report_of_a_later_llmq_is_refused(runs, command, version, llmq):
    file = runs / "a" / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": version}))
    ended, out, err = llmq(command[0], "a", *command[1:])
    assert (ended, out) == (2, "")
    assert f"schema version {version!r}; this llmq knows 2" in err


@pytest.mark.slow
def test_our_run_and_lm_evals_own_differ_by_nothing(tiny_llama, tmp_path):
    limit = "40"
    command = ["run", "--model", "hf", "--model_args", f"pretrained={tiny_llama},dtype=float32"]
    command += ["--tasks", "pydoc_continuation", "--device", "cpu", "--limit", limit, "--batch_size", "4"]
    command += [
        "--include_path",
        str(bundled("evals") / "lm_eval"),
        "--log_samples",
        "--output_path",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    task = plugin.build({"lm_eval": {"tasks": ["pydoc_continuation"], "limit": int(limit)}}, "tasks")
    pipeline.evaluate({"0-base": base_of(tiny_llama, "float32")}, [task], tmp_path / "ours", CPU, {})
    pairs, found = compared(tmp_path / "ours" / "0-base", tmp_path / "t")
    assert not found.refusals
    assert {metric for _, metric in pairs} >= {"acc", "acc_norm"}
    for c in pairs.values():
        assert (c.difference, c.verdict) == (0.0, "same")
        assert c.ci95 == pytest.approx((0.05 ** (1 / 40) - 1, 1 - 0.05 ** (1 / 40)))  # the exact bound
    assert results.read(str(tmp_path / "ours"))[0].figures.keys() >= {("pydoc_continuation", "acc")}

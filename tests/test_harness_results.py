"""Figures of lm-eval's tasks: directions, documents, perplexities, guessing; against lm-eval's own evaluation."""

import math

import pytest
import torch
from helpers import CPU, apply, base_of
from lm_eval_tasks import CHOICE, LAMBADA, WIKITEXT, metrics, rows, write

from llmq import pipeline, plugin
from llmq.errors import LlmqError, UserError
from llmq.harness import results as harness_results
from llmq.statistics import estimates, pairing
from llmq.types import Measurement


def figures(artifact, folder, *tasks, **settings):
    """The measurements of tasks in a folder, by task and metric."""
    asked = plugin.build({"lm_eval": {"tasks": list(tasks), "include_path": str(folder), **settings}}, "tasks")
    with artifact.open("cpu") as loaded:
        return {(m.task, m.metric): m for m in asked.score(loaded) if isinstance(m, Measurement)}


def oracle(artifact, folder, *tasks):
    """What lm-eval's own command would say, by its own class for models of transformers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with artifact.open("cpu") as loaded:
        model = HFLM(pretrained=loaded.module, tokenizer=loaded.processor, batch_size=1)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return evaluator.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


@pytest.mark.slow
def test_every_kind_of_task_has_lm_evals_figures_and_samples_that_make_them(tiny_llama, tmp_path):
    write(tmp_path, "choice", {**CHOICE, "metric_list": metrics("acc", "acc_norm", "acc_mutual_info")})
    names = ["choice", write(tmp_path, "lambada", LAMBADA), write(tmp_path, "wiki", WIKITEXT)]
    base = base_of(tiny_llama, "float32")
    found, theirs = figures(base, tmp_path, *names), oracle(base, tmp_path, *names)
    said = {(t, k.partition(",")[0]): v for t in names for k, v in theirs["results"][t].items() if ",none" in k}
    said = {k: v for k, v in said.items() if "stderr" not in k[1]}
    assert set(found) == set(said)
    for key, m in found.items():
        assert m.value == pytest.approx(said[key], rel=1e-5), key
        assert m.samples is not None, key
        assert estimates.figure(m.samples)[0] == pytest.approx(m.value, rel=1e-9), key
        assert m.n == len(m.samples.values) == len(set(m.samples.ids)) == 12, key
    assert {k[1]: m.samples.statistic for k, m in found.items() if k[0] != "choice"} == {
        "perplexity": "exp",
        "acc": "mean",
        "word_perplexity": "exp",
        "byte_perplexity": "exp",
        "bits_per_byte": "mean",
    }
    texts = [row["text"] for row in rows()]
    assert found["wiki", "byte_perplexity"].samples.weights == tuple(float(len(t)) for t in texts)
    assert found["wiki", "word_perplexity"].samples.weights == tuple(float(len(t.split())) for t in texts)
    lower = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert {k for k, m in found.items() if m.better == "lower"} == {k for k in found if k[1] in lower}
    # Beside mutual information every question is asked twice; three choices are still three.
    assert all(m.chance == pytest.approx(1 / 3) for k, m in found.items() if k[0] == "choice")
    assert found["lambada", "acc"].chance is None


@pytest.mark.slow
def test_perplexities_of_tasks_have_paired_verdicts(tiny_llama, tmp_path):
    folder = tmp_path / "tasks"
    names = [write(folder, "lambada", LAMBADA), write(folder, "wiki", WIKITEXT)]
    base = base_of(tiny_llama, "float32")
    worse = apply("quantize.rtn", base, tmp_path / "worse", bits=2, group_size=32)
    asked = plugin.build({"lm_eval": {"tasks": names, "include_path": str(folder)}}, "tasks")
    report = pipeline.evaluate({"0-base": base, "1-rtn": worse}, [asked], tmp_path / "out", CPU, {}, cache=False)
    compared = {c["metric"]: c for c in report.comparisons}
    assert all(compared[m]["ci95"] for m in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"))


SCORER = """
def process_results(doc, results):
    told = {"own": results[0][0]} if doc["answer"] != SKIPPED else {}
    return {**told, "right": float(doc["answer"] == 1)}
"""


def scored_by(folder, name, code, names=("own", "right"), **more):
    (folder / f"{name}_code.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_code.py").write_text(code)
    says = {
        "process_results": f"!function {name}_code.process_results",
        "metric_list": metrics(*names, aggregation="mean"),
    }
    return write(folder, name, {**CHOICE, **says, **more})


def test_documents_that_a_task_leaves_unscored_are_counted_and_pairs_are_by_document(tiny_llama, tmp_path, trusting):
    scored_by(tmp_path, "some", SCORER.replace("SKIPPED", "2"))
    scored_by(tmp_path, "others", SCORER.replace("SKIPPED", "0"))
    base = base_of(tiny_llama, "float32")
    found = figures(base, tmp_path, "some", "others")
    own, right = found["some", "own"], found["some", "right"]
    assert (own.n, right.n) == (8, 12)
    assert "4 of 12 questions left unscored" in own.convention
    assert "unscored" not in right.convention
    assert [i.split(":")[1] for i in own.samples.ids] == [str(i) for i in range(12) if i % 3 != 2]
    assert [i.split(":")[1] for i in found["others", "own"].samples.ids] == [str(i) for i in range(12) if i % 3]
    theirs = oracle(base, tmp_path, "some")["results"]["some"]
    assert own.value == pytest.approx(theirs["own,none"], rel=1e-5)


def test_a_direction_that_nobody_says_is_unknown_and_never_lower(tiny_llama, tmp_path, trusting):
    scored_by(tmp_path, "some", SCORER.replace("SKIPPED", "9"), names=("own", "right", "acc"))
    found = figures(base_of(tiny_llama), tmp_path, "some")
    assert {k[1]: m.better for k, m in found.items()} == {"own": "unknown", "right": "unknown"}
    results = {"results": {"t": {}}, "higher_is_better": {"t": {"acc": None, "ter": None, "own": None, "mine": False}}}
    said = {m: harness_results.direction(results, "t", m) for m in ("acc", "ter", "own", "mine", "exact_match", "new")}
    assert said == {
        "acc": "higher",
        "ter": "lower",
        "own": "unknown",
        "mine": "lower",
        "exact_match": "higher",
        "new": "unknown",
    }


def test_a_group_counts_each_document_once_and_takes_the_direction_of_its_tasks(tiny_llama, tmp_path):
    names = [write(tmp_path, n, {**CHOICE, "filter_list": FILTERS}) for n in ("one", "two")]
    inner = "group: inner\ntask: [one, two]\naggregate_metric_list: [{metric: acc, filter_list: [none, again]}]\n"
    (tmp_path / "inner.yaml").write_text(inner)
    (tmp_path / "outer.yaml").write_text(inner.replace("inner", "outer").replace("[one, two]", "[inner]"))
    found = figures(base_of(tiny_llama, "float32"), tmp_path, "outer")
    for group in ("inner", "outer"):
        for metric in ("acc", "acc (again)"):
            m = found[group, metric]
            assert (m.n, len(m.samples.ids), len(set(m.samples.ids)), m.better) == (24, 24, 24, "higher")
            both = [found[name, metric].value for name in names]
            assert m.value == pytest.approx(sum(both) / 2)
    results = {
        "results": {"a": {"x,none": 1.0}, "b": {"x,none": 1.0}, "g": {"x,none": 1.0}},
        "group_subtasks": {"g": ["h"], "h": ["a", "b"]},
        "higher_is_better": {"a": {"x": True}, "b": {"x": False}},
    }
    assert harness_results.direction(results, "g", "x") == "unknown"
    assert (
        harness_results.direction({**results, "higher_is_better": {t: {"x": False} for t in "ab"}}, "g", "x") == "lower"
    )


FILTERS = [
    {"name": "none", "filter": [{"function": "take_first"}]},
    {"name": "again", "filter": [{"function": "take_first"}]},
]


def test_a_task_that_fails_leaves_the_others_figures(tiny_llama, tmp_path, trusting):
    folder = tmp_path / "tasks"
    write(folder, "choice", CHOICE)
    scored_by(folder, "bad", "def process_results(doc, results):\n    raise KeyError('gold')\n")
    asked = plugin.build({"lm_eval": {"tasks": ["bad", "choice"], "include_path": str(folder)}}, "tasks")
    report = pipeline.evaluate({"0-base": base_of(tiny_llama)}, [asked], tmp_path / "out", CPU, {}, cache=False)
    assert {m["task"] for m in report.measurements} == {"choice"}
    assert [f["error"] for f in report.failures] == ["bad: KeyError: 'gold'"]
    assert (tmp_path / "out/0-base/lm_eval").is_dir()


def test_a_figure_that_is_no_number_is_a_failure_and_the_others_stay(tiny_llama, tmp_path, trusting):
    code = "def process_results(doc, results):\n    return {'own': float('nan'), 'right': 1.0}\n"
    scored_by(tmp_path, "nan", code)
    with pytest.raises(LlmqError, match=r"nan own \(none\) is nan, no finite number"):
        figures(base_of(tiny_llama), tmp_path, "nan")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"choices": ["", "a", "b"]}, "task 'broken', question 3: the continuation '' has no tokens"),
        ({"question": "\t "}, r"task 'broken', question 3: the context '\\t ' is blank"),
        (
            {"choices": ["word " * 900, "a", "b"]},
            "question 3: the continuation has .* the model takes 512; .* 'word word",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line_with_task_and_question(tiny_llama, tmp_path, changes, says):
    data = rows(5)
    data[3] |= changes
    write(tmp_path, "broken", {**CHOICE, "target_delimiter": ""}, data)
    with pytest.raises(LlmqError, match=says) as caught:
        figures(base_of(tiny_llama), tmp_path, "broken")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_questions_that_lose_their_beginning_are_counted(tiny_llama, tmp_path):
    data = rows(5)
    data[1]["question"] = "The statement " * 400
    write(tmp_path, "long", CHOICE, data)
    written = {**LAMBADA, "output_type": "generate_until", "metric_list": metrics("exact_match")}
    write(tmp_path, "writing", {**written, "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}}, data)
    base = base_of(tiny_llama, "float32")
    found = figures(base, tmp_path, "long", "writing")
    for m in found.values():
        assert "1 questions cut on the left" in m.convention
    theirs = oracle(base, tmp_path, "long")["results"]["long"]
    assert found["long", "acc"].value == theirs["acc,none"]
    assert "cut" not in figures(base, tmp_path, "long", limit=1)["long", "acc"].convention


def test_questions_that_stand_many_times_in_the_data_are_few(tiny_llama, tmp_path):
    """Thirteen questions ten times over had the interval of 130."""
    once = figures(base_of(tiny_llama), tmp_path / "a", write(tmp_path / "a", "once", CHOICE, rows(13)))
    often = figures(base_of(tiny_llama), tmp_path / "b", write(tmp_path / "b", "often", CHOICE, rows(13) * 10))
    plain, repeated = once["once", "acc"], often["often", "acc"]
    assert repeated.value == pytest.approx(plain.value)
    assert repeated.stderr == pytest.approx(plain.stderr, rel=1e-6)
    assert pairing.count(repeated.samples) == 13
    assert "13 of 130 questions differ" in repeated.convention
    assert plain.samples.clusters is None


def test_one_document_scored_twice_is_refused():
    answer = {"task": "t", "doc_id": 1, "doc_hash": "x", "acc": 1.0}
    with pytest.raises(UserError, match="document 't:1:x' is scored twice"):
        harness_results.paired([answer, dict(answer)], "acc", 1.0)


def test_flips_are_of_documents_that_both_models_answered(tiny_llama):
    divergence = plugin.build({"divergence": {"tasks": ["pydoc_continuation"]}}, "tasks")
    before = {f"t:{i}": float(i % 2) for i in range(8)}
    after = {f"t:{i}": float(i % 2) for i in range(1, 9)}
    found = {m.metric: m for m in divergence._flips("t", before, after, 10, "base")}
    assert {m.value for m in found.values()} == {0.0}
    assert {m.n for m in found.values()} == {7}
    assert "3 of 10 questions left unscored" in found["flips t"].convention
    assert not math.isnan(torch.tensor([m.value for m in found.values()]).sum())

"""One task that fails costs nothing but its own answers: the rest is in the report, and the command ends with 4."""

import json

import pytest
import yaml
from helpers import CPU, base_of

from llmq import cli, pipeline, plugin, questions, recipe
from llmq.errors import UserError
from llmq.report import Report

SPEED = {"speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 3}}


@pytest.fixture
def job(tiny_llama, tiny_jsonl, tmp_path):
    """Writes the recipe of one quantization of the tiny model, with tasks and rules."""

    def write(tasks, *rules):
        plain = {
            "model": {"causal_lm": {"weights": str(tiny_llama)}},
            "steps": [{"quantize.bnb": {"bits": 4}}],
            "evaluate": tasks,
            **({"gate": list(rules)} if rules else {}),
        }
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(plain))
        return file

    return write


@pytest.fixture
def perplexity(tiny_jsonl):
    return {"perplexity": {"data": str(tiny_jsonl), "part": "all", "limit": 4}}


def breaks(monkeypatch, word, method, error, stage="1-quantize.bnb"):
    """Let a task fail at one stage, and count how often each stage is asked."""
    cls, asked = plugin.load(f"tasks.{word}"), []
    stock = getattr(cls, method)

    def broken(self, loaded, *others):
        name = "1-quantize.bnb" if loaded.artifact.history else "0-base"
        asked.append(name)
        if name == stage:
            raise error
        return stock(self, loaded, *others)

    monkeypatch.setattr(cls, method, broken)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("error", [UserError("the 'x' is wrong"), KeyError("gold"), RuntimeError("out of\nmemory")])
def test_the_others_are_reported_and_resuming_asks_only_what_failed(job, perplexity, tmp_path, monkeypatch, error):
    out, loaded = tmp_path / "run", recipe.load(str(job(["size", perplexity])))
    sizes = []
    stock = plugin.load("tasks.size").score
    monkeypatch.setattr(plugin.load("tasks.size"), "score", lambda *a: sizes.append(1) or stock(*a))
    with monkeypatch.context() as patch:
        breaks(patch, "perplexity", "score", error)
        report = pipeline.run(loaded, out, cache=False)
    (failure,) = report.failures
    assert (failure["stage"], failure["task"], failure["asked"]) == ("1-quantize.bnb", "perplexity", "score")
    assert "\n" not in failure["error"]
    whole = {(m["stage"], m["task"]) for m in report.measurements}
    assert whole == {("0-base", "size"), ("0-base", "perplexity"), ("1-quantize.bnb", "size")}
    assert json.loads((out / "report.json").read_text())["failures"] == [failure]
    for face in ("report.md", "report.html"):
        text = (out / face).read_text()
        assert "FAILED: 1-quantize.bnb: perplexity" in text, face
    assert "Traceback" in (out / "log.txt").read_text()

    asked = breaks(monkeypatch, "perplexity", "score", error, stage="none")
    mended = pipeline.run(loaded, out, resume=True, cache=False)
    assert not mended.failures
    assert asked == ["1-quantize.bnb"]
    assert len(sizes) == 2
    straight = pipeline.run(loaded, tmp_path / "straight", cache=False)
    same = [{tuple(sorted(m.items())) for m in r.measurements if m["unit"] != "s"} for r in (mended, straight)]
    assert same[0] == same[1]
    kept = [
        (f / "1-quantize.bnb/samples/perplexity.token_perplexity.jsonl").read_text()
        for f in (out, tmp_path / "straight")
    ]
    assert kept[0] == kept[1]


def test_a_clock_that_fails_at_one_stage_leaves_the_times_of_the_others(job, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        breaks(patch, "speed", "clocks", ValueError("no cache"))
        report = pipeline.run(recipe.load(str(job(["size", SPEED]))), tmp_path / "run")
    assert {(f["stage"], f["error"]) for f in report.failures} == {("1-quantize.bnb", "ValueError: no cache")}
    assert "clocks" in {f["asked"] for f in report.failures}
    assert {m["stage"] for m in report.measurements if m["task"] == "speed"} == {"0-base"}


def test_a_clock_that_fails_while_it_runs_is_named_and_the_others_timed():
    from llmq.types import Clock, Reading

    def fail():
        raise RuntimeError("out of memory")

    class Timed(plugin.load("tasks.speed")):
        def clocks(self, loaded):
            run = fail if loaded == "b" else (lambda: None)
            yield Clock("speed", run, (Reading("latency", "s", "lower", lambda s: s),), "c", warmup=1, rounds=3)

    failures = {stage: [] for stage in "abc"}
    measured = questions.time_task("speed", Timed(), {n: n for n in "abc"}, "cpu", failures)
    assert sorted(measured) == ["a", "c"]
    assert [failure.error for failure in failures["b"]] == ["RuntimeError: out of memory"]


def test_a_failure_beside_the_base_is_one_too(job, tmp_path, monkeypatch):
    divergence = {"divergence": {"tasks": [], "windows": 2, "window": 32}}
    with monkeypatch.context() as patch:
        breaks(patch, "divergence", "against", ValueError("x"))
        report = pipeline.run(recipe.load(str(job(["size", divergence]))), tmp_path / "run")
    assert [(f["task"], f["asked"]) for f in report.failures] == [("divergence", "against")]


@pytest.mark.parametrize("rule", ["bytes_on_disk <= 1kB", "perplexity <= 1.1x base"])
def test_the_command_ends_with_4_before_what_a_gate_says(job, perplexity, tmp_path, monkeypatch, capsys, rule):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        breaks(patch, "perplexity", "score", KeyError("gold"))
        patch.setattr("sys.argv", ["llmq", "run", str(job(["size", perplexity], rule)), "--out", "run", "--no-cache"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 4
    said = capsys.readouterr()
    assert "FAILED: 1-quantize.bnb: perplexity: KeyError: 'gold'" in said.out
    assert "Traceback" not in said.err
    assert (Report.read(tmp_path / "run").gate or {}).get("verdict") == ("fail" if "bytes" in rule else None)


def test_eval_reports_the_rest_and_ends_with_4(tiny_llama, perplexity, tmp_path, monkeypatch, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(["size", perplexity]))
    breaks(monkeypatch, "perplexity", "score", KeyError("gold"), stage="0-base")
    argv = [
        "llmq",
        "eval",
        str(tiny_llama),
        "--suite",
        str(suite),
        "--out",
        str(tmp_path / "e"),
        "--json",
        "--no-cache",
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 4
    assert [f["task"] for f in told["failures"]] == ["perplexity"]
    assert {m["task"] for m in told["measurements"]} == {"size"}


def test_an_interrupt_is_no_failure_and_a_model_that_does_not_open_is_none_of_a_task(
    tiny_llama, perplexity, tmp_path, monkeypatch
):
    tasks = [plugin.build(t, "tasks") for t in ("size", perplexity)]
    artifact = base_of(tiny_llama)
    with monkeypatch.context() as patch:
        breaks(patch, "perplexity", "score", KeyboardInterrupt(), stage="0-base")
        with pytest.raises(KeyboardInterrupt):
            pipeline.evaluate({"0-base": artifact}, tasks, tmp_path / "a", CPU, {}, cache=False)
    monkeypatch.setattr(type(artifact.model), "open", lambda *a: (_ for _ in ()).throw(UserError("no such weights")))
    with pytest.raises(UserError, match="no such weights"):
        pipeline.evaluate({"0-base": artifact}, tasks, tmp_path / "b", CPU, {}, cache=False)


@pytest.mark.slow
def test_the_names_of_a_task_do_not_hang_on_whether_another_failed(tiny_llama, tmp_path, monkeypatch):
    """Or the second of two questions of one name would be set beside the base's first."""
    shots = [plugin.build({"lm_eval": {"tasks": ["pydoc_continuation"], "limit": n}}, "tasks") for n in (2, 3)]
    cls = type(shots[0])
    stock = cls.score

    def first_fails(self, loaded):
        if self.limit == 2:
            raise ValueError("x")
        return stock(self, loaded)

    monkeypatch.setattr(cls, "score", first_fails)
    report = pipeline.evaluate({"0-base": base_of(tiny_llama)}, shots, tmp_path / "a", CPU, {}, cache=False)
    assert {m["task"] for m in report.measurements} == {"pydoc_continuation (lm_eval-2)"}

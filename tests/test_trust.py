"""Code of a folder runs only where a flag of the very command says so; paths in a run stay in the run."""

import json
import os
import shutil

import pytest
import yaml
from helpers import CPU, exit_code
from lm_eval_tasks import CHOICE, metrics, write

from llmq import pipeline, plugin, recipe, trust
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.judge import replay, results
from llmq.report import Report
from llmq.runs import paths as run_paths

OWN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
FLAG = "where you trust it, say so on this command: --trust-remote-code"


@pytest.fixture
def marker(tmp_path):
    """A file that is there once the folder's code has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def own_folder(tiny_llama, tmp_path, marker):
    """A whole model whose network is a class of its own."""
    folder = shutil.copytree(tiny_llama, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(OWN.format(marker=str(marker)))
    return folder


def stage(folder, weights, **model):
    """A stage that says what somebody wrote into it."""
    folder.mkdir(parents=True)
    told = {"runtime": "torch", "packed": False, "history": [], "notes": {}, "measurements": [], "adapter": None}
    settings = {"weights": str(weights), "dtype": "float32", **model}
    data = {**told, "model": {"models.causal_lm": settings}, "weights": str(weights)}
    (folder / "artifact.json").write_text(json.dumps(data))
    return folder


def llmq(capsys, *words):
    """The exit code of a command line, and what it said."""
    return exit_code(*words), capsys.readouterr()


@pytest.mark.parametrize("asks", [True, False])
def test_a_stage_cannot_open_its_own_code(own_folder, marker, tmp_path, monkeypatch, capsys, asks):
    suite = tmp_path / "suite.yaml"
    suite.write_text("- size\n")
    where = stage(tmp_path / "run" / "0-base", own_folder, trust_remote_code=asks)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=FLAG), Artifact.load(where).open("cpu"):
        pass
    assert not marker.exists()
    code, said = llmq(capsys, "eval", where, "--suite", suite)
    assert (code, FLAG in said.err) == (2, True)
    assert not marker.exists()
    code, said = llmq(capsys, "eval", where, "--suite", suite, "--trust-remote-code", "--out", "out")
    assert code == 0, said.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["environment"]["trusted"] == ["--trust-remote-code: Python that folders brought was allowed to run"]
    for face in ("report.md", "report.html"):
        assert "TRUSTED: --trust-remote-code" in (tmp_path / "out" / face).read_text()
    assert "TRUSTED: --trust-remote-code" in said.out
    with Artifact.load(where).open("cpu") as loaded:
        assert type(loaded.module).__name__ == "Own"
    assert marker.exists()


def test_a_recipe_that_asks_for_trust_needs_the_flag(own_folder, marker, tmp_path, monkeypatch, capsys):
    told = {"causal_lm": {"weights": str(own_folder), "trust_remote_code": True, "dtype": "float32"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"model": told, "steps": [], "evaluate": ["size"]}))
    monkeypatch.chdir(tmp_path)
    for words in (("run", "job.yaml"), ("check", "job.yaml"), ("check", "--data", "job.yaml")):
        code, said = llmq(capsys, *words)
        assert code == 2
        assert FLAG in said.err
        assert said.err.count("\n") == 1
    assert not marker.exists()
    assert llmq(capsys, "run", "job.yaml", "--out", "run", "--trust-remote-code")[0] == 0
    report = Report.read(tmp_path / "run")
    assert report.environment["trusted"] == report.stages[0]["notes"]["trusted"] == trust.told()
    code, said = llmq(capsys, "replay", "run")
    assert (code, FLAG in said.err) == (2, True)
    assert llmq(capsys, "replay", "run", "--trust-remote-code")[0] == 0


def test_one_command_does_not_trust_for_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trust.given(remote_code=True, written_code=True)
    llmq(capsys, "list")
    assert trust.told() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation 'somebody/kernel' asks for native code"),
        ({"sub": {"_experts_implementation": {"a": "some/body"}}}, "_experts_implementation 'some/body' asks"),
    ],
)
def test_a_kernel_of_the_hub_is_code(tiny_llama, tmp_path, changes, says):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    model = plugin.build({"causal_lm": {"weights": str(folder)}}, "models")
    with pytest.raises(UserError, match=says):
        model.base(CPU)
    with pytest.raises(UserError, match=says), Artifact(model, folder).open("cpu"):
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "adapter of type 'PROMPT_TUNING'"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "import 'antigravity'"),
    ],
)
def test_an_adapter_imports_nothing(tmp_path, changes, says):
    from llmq.text.opening import with_adapter

    (tmp_path / "adapter_config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=says):
        with_adapter(None, tmp_path)


@pytest.mark.parametrize(
    "says",
    [
        {"process_results": "!function code.score"},
        {"process_docs": "!function os.system"},
        {"metric_list": metrics("./metric.py", aggregation="mean")},
        {"metric_list": [{"metric": "own", "hf_evaluate": True}]},
        {"include": "other.yaml"},
    ],
)
def test_tasks_of_a_folder_call_no_code_of_it(tmp_path, marker, says):
    (tmp_path / "other.yaml").write_text("process_results: !function code.score\n")
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\ndef score(doc, results): return {{}}\n")
    task = plugin.build(
        {"lm_eval": {"tasks": [write(tmp_path, "t", {**CHOICE, **says})], "include_path": str(tmp_path)}}, "tasks"
    )
    for ask in (task.check, task.depends):
        with pytest.raises(UserError, match=FLAG):
            ask()
    assert not marker.exists()
    trust.given(remote_code=True)
    task.check()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"odd\.yaml:\d+: more than 20000 values once aliases"),
        (MERGES, r"odd\.yaml:\d+: more than 20000 values once aliases"),
        ("a: &a [*a]", r"odd\.yaml:1: nested deeper than 32; does an alias"),
        ("a: " + "[" * 500 + "]" * 500, r"odd\.yaml:1: nested deeper than 32"),
        ("a: !mine 3", r"odd\.yaml' is no plain YAML: could not determine a constructor for the tag '!mine'"),
        ("a: !!python/object:os.system {}", r"odd\.yaml' is no plain YAML: .* tag '.*python/object:os\.system'"),
        ("a: !!python/name:os.system ''", r"odd\.yaml' is no plain YAML: .* tag '.*python/name:os\.system'"),
        ("a: !function [b]", r"odd\.yaml' is no plain YAML: expected a scalar node"),
        ("a: [", r"odd\.yaml:\d: not YAML"),
        ("a: " + "x" * 2**20, r"odd\.yaml: 1048579 characters; "),
        ("a: " + "x" * 2**22, r"odd\.yaml' has 4.* is the most that is read of it"),
        ("include: [odd.yaml]", r"odd\.yaml' is included twice"),
        ("include: [3]", r"/3' cannot be read"),
        ("include: gone.yaml", r"gone\.yaml' cannot be read"),
        (None, r"odd\.yaml' is a pipe, and no file"),
    ],
)
def test_files_beside_a_task_are_bounded_before_lm_eval_reads_them(tmp_path, text, says, included):
    name = write(tmp_path / "tasks", "t", {**CHOICE, **({"include": "../odd.yaml"} if included else {})})
    odd = tmp_path / ("odd.yaml" if included else "tasks/odd.yaml")
    if text is None:
        os.mkfifo(odd)
    else:
        odd.write_text(text)
    task = plugin.build({"lm_eval": {"tasks": [name], "include_path": str(tmp_path / "tasks")}}, "tasks")
    for ask in (task.check, task.depends):
        with pytest.raises(UserError, match=says) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_second_file_of_a_tasks_name_runs_nothing_either(tmp_path, marker):
    """lm-eval looks a task up in its own way, and may find another file than llmq did."""
    write(tmp_path, "t", CHOICE)
    text = (tmp_path / "t.yaml").read_text()
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\ndef score(doc, results): return {{}}\n")
    for other in ("a.yaml", "z.yaml"):
        (tmp_path / other).write_text(
            text.replace("task: t\n", "task: 't'  # t\n") + "process_results: !function code.score\n"
        )
    task = plugin.build({"lm_eval": {"tasks": ["t"], "include_path": str(tmp_path)}}, "tasks")
    with pytest.raises(UserError, match=FLAG):
        task.depends()
    assert not marker.exists()


def a_run(tmp_path):
    """A run with one exhibit that has a picture."""
    run = tmp_path / "run"
    (run / "0-base/pictures").mkdir(parents=True)
    (run / "recipe.yaml").write_text("model: gan-faces\n")
    (run / "0-base/pictures/a.png").write_bytes(run_paths.PNG)
    return run


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "0-base/../../x.png", "link.png", "\0", 3])
def test_a_picture_lies_inside_of_the_run(tmp_path, name):
    run = a_run(tmp_path)
    (run / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "x.png").write_bytes(run_paths.PNG)
    with pytest.raises(UserError, match=r"names .*, which does not lie inside"):
        run_paths.picture(run, name)
    assert run_paths.picture(run, "0-base/pictures/a.png") == run_paths.PNG
    with pytest.raises(UserError, match="is no PNG"):
        run_paths.picture(run, "recipe.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        run_paths.picture(run, "0-base/none.png")


def test_an_exhibit_of_a_resumed_run_embeds_no_file_from_elsewhere(tiny_llama, tmp_path):
    plain = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": [], "evaluate": ["size"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(plain))
    job = recipe.load(str(tmp_path / "job.yaml"))
    run = tmp_path / "run"
    pipeline.run(job, run)
    kept = run / "0-base/measurements.json"
    data = json.loads(kept.read_text())
    shown = {"task": "size", "title": "t", "input": "", "output": "", "reference": "", "file": "../../etc/passwd"}
    kept.write_text(json.dumps({**data, "exhibits": [shown]}))
    (run / "report.html").unlink()
    with pytest.raises(UserError, match=r"measurements.json' names '../../etc/passwd', which does not lie inside"):
        pipeline.run(job, run, resume=True)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("kind", ["log.txt", "0-base/samples", ".report.json.partial", "fifo"])
def test_a_run_with_a_way_out_is_opened_by_no_command(tmp_path, kind, monkeypatch, capsys):
    run, victim = a_run(tmp_path), tmp_path / "victim"
    victim.write_text("mine")
    if kind == "fifo":
        os.mkfifo(run / "measurements.json")
    else:
        (run / kind).symlink_to(victim)
    (run / "report.json").write_text("{}")
    (run / "hashes.json").write_text('{"files": {}}')
    stage(run / "1-x", "/nowhere")
    for open_run in (replay.verify, results.run, lambda r: replay.replay(r, tmp_path / "out", pipeline.run)):
        with pytest.raises(UserError, match=r"lies outside of|neither a file nor a folder"):
            open_run(run)
    monkeypatch.chdir(tmp_path)
    for words in (("eval", run, "--suite", "text-quick"), ("eval", run / "1-x", "--suite", "text-quick")):
        code, said = llmq(capsys, *words)
        assert (code, said.err.count("\n")) == (2, 1)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": "../../elsewhere"}, "does not lie inside"),
        ({"adapter": "../../elsewhere"}, "does not lie inside"),
        ({"adapter": "/etc"}, "does not lie inside"),
        ({"model": {"quantize.bnb": {}}}, "'quantize.bnb' is no word of models"),
    ],
)
def test_what_a_stage_is_made_of_lies_inside_of_its_run(tmp_path, changes, says):
    folder = stage(tmp_path / "run" / "0-base", "/base")
    assert str(Artifact.load(folder).weights) == "/base"  # the base may lie anywhere
    data = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(UserError, match=says):
        Artifact.load(folder)


def test_a_stage_of_a_report_lies_inside_of_the_run(tmp_path):
    run = a_run(tmp_path)
    entry = {"stage": "../../etc", "task": "t", "metric": "m"}
    (run / "report.json").write_text(json.dumps({"measurements": [entry], "environment": {}, "recipe": {}}))
    (run / "hashes.json").write_text('{"files": {}}')
    for open_run in (results.run, replay.verify):
        with pytest.raises(UserError, match="does not lie inside"):
            open_run(run)


def test_an_index_names_files_beside_it(tmp_path):
    from llmq.guarded.weights import safetensors_of

    told = {"metadata": {}, "weight_map": {"a": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="the files of weights lie beside it"):
        safetensors_of(tmp_path)

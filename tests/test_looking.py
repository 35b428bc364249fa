"""The commands that look: list, show, runs, doctor, help, version; and the completion of a shell."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import size, write_run
from typer.testing import CliRunner

from llmq import api, cli, doctor, listing, plugin, targets
from llmq.cli import completing, looking, streams
from llmq.errors import UserError
from llmq.report import Report, screen, shelf


def told(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/first", {"0-base": [size(100.0)], "1-quantize.rtn": [size(40.0)]})
    unfinished = tmp_path / "runs/second"
    (unfinished / "0-base").mkdir(parents=True)
    (unfinished / "0-base/artifact.json").write_text("{}")
    (unfinished / "recipe.yaml").write_text("model: {causal_lm: {weights: org/name}}\nsteps: [adapt.lora]\n")
    damaged = tmp_path / "runs/third"
    damaged.mkdir()
    (damaged / "report.json").write_text("[")
    for age, name in enumerate(("third", "second", "first")):
        os.utime(tmp_path / "runs" / name, (10**9 - age, 10**9 - age))
    return tmp_path / "runs"


def test_help_has_a_short_form_and_the_version_is_told():
    assert told("-h") == told("--help")
    assert told("--version").split()[0] == "llmq"
    assert told("help", "quantize.rtn") == told("show", "quantize.rtn")
    assert told("help") == told("--help")
    assert told("help", "run") == told("run", "--help")


def test_the_words_of_one_kind():
    names = [line.split()[0] for line in told("list", "data").splitlines()]
    assert names == ["data", *(word for word in plugin.words() if word.startswith("data."))]
    assert json.loads(told("list", "evals", "--json"))["evals"].keys() >= {"text-quick"}
    with pytest.raises(UserError, match="'date' is no kind of words; did you mean 'data'"):
        looking.list_words("date")


def test_a_suite_and_a_run_are_shown(runs):
    assert "- perplexity" in told("show", "text-quick")
    assert "bytes_on_disk" in told("show", "runs/first")
    assert json.loads(told("show", "runs/first", "--json"))["measurements"]
    with pytest.raises(UserError, match="it is no run of llmq"):
        looking.show("runs/second")


def test_a_short_name_that_has_one_meaning_is_found_and_one_that_has_several_lists_them(runs):
    assert told("show", "speed") == told("show", "tasks.speed")
    assert told("show", "quickstart") == told("show", "text/quickstart")
    with pytest.raises(UserError, match=r"'rock' may be data\.rock or tasks\.rock; say which"):
        looking.show("rock")
    with pytest.raises(UserError, match="unknown word 'spee'"):
        looking.show("spee")


def test_an_evaluation_has_no_stages_to_come():
    run = shelf.Shelved("runs/eval", "org/name", (), "", 2, "", "")
    assert [replace(run, evaluated=e).progress for e in (True, False)] == ["2 stages evaluated", "2 of 1 stages"]
    assert replace(run, evaluated=True, done=1).progress == "1 stage evaluated"


@pytest.mark.parametrize(
    ("suite", "tasks", "limit", "told_so"),
    [
        (None, None, 5, "--limit 5 goes with --tasks a,b,c; a suite says its own limits"),
        ("text-quick", None, 5, "--limit 5 goes with --tasks"),
        ("text-quick", None, 0, "--limit 0 goes with --tasks"),
        ("text-quick", "hellaswag", None, "--suite text-quick and --tasks hellaswag exclude each other"),
        (None, None, None, "nothing is asked: name --suite NAME"),
    ],
)
def test_what_is_asked_for_is_refused_in_words_of_its_options(suite, tasks, limit, told_so):
    with pytest.raises(UserError, match=told_so):
        targets.asked_for(suite, tasks, limit)


def test_no_examples_are_asked_for_as_0_and_not_as_the_tasks_own_number():
    ((told,),) = [
        entry.values() for entry in targets.asked_for(None, "gsm8k", 0, num_fewshot=0, apply_chat_template=False)
    ]
    assert told == {"tasks": ["gsm8k"], "num_fewshot": 0, "limit": 0}


def test_runs_are_listed_the_latest_first_whole_or_not(runs):
    third, second, first = shelf.runs(runs)
    assert third.headline.startswith("damaged: ")
    assert (second.model, second.steps, second.done) == ("org/name", ("adapt.lora",), 1)
    assert second.headline == "not ended: 1 of 2 stages"
    assert first.done == 2
    assert "bytes on disk 0.40×" in first.headline
    lines = told("runs").splitlines()
    assert len(lines) == 9
    assert [run["folder"] for run in json.loads(told("runs", "--json"))] == ["runs/third", "runs/second", "runs/first"]
    with pytest.raises(UserError, match="there is no folder 'gone'"):
        looking.list_runs(Path("gone"))


def test_lines_are_wrapped_by_words_on_a_terminal_alone(monkeypatch):
    assert listing.wrapped("head ", "word " * 40) == "head " + "word " * 39 + "word"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = listing.wrapped("head ", "word " * 40).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith("     word") for line in lines[1:])


def test_nothing_of_a_word_is_wider_than_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns in (50, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = listing.settings_of("quantize.gptq", plugin.load("quantize.gptq")).splitlines()
        assert all(len(line) <= columns for line in shown)
        told_of = {line.split()[0] for line in shown if line.strip()}
        assert plugin.load("quantize.gptq").model_fields.keys() <= told_of


def test_names_are_completed(runs):
    assert {"text/gptq4", "text/gptq4-lora"} <= set(completing.recipes("text/gptq4"))
    assert "quantize.gptq" in completing.shown("quantize.")
    assert completing.runs("runs/f") == completing.shown("runs/f") == ["runs/first"]
    assert completing.stages("runs/s") == ["runs/second"]
    assert completing.stages("runs/second/") == ["runs/second/0-base"]
    assert completing.suites("text-q") == ["text-quick"]
    assert completing.words_of("export")("g") == ["gguf"]
    assert completing.kinds("rec") == ["recipes"]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("gate runs/f", "runs/first"),
        ("chat runs/second/", "runs/second/0-base"),
        ("check text/gptq4-g", "text/gptq4-gguf"),
        ("list evals", "evals"),
        ("quantize model --method gp", "gptq"),
        ("eval runs/first --suite text-q", "text-quick"),
        ("export runs/first --to gg", "gguf"),
    ],
)
def test_a_shell_completes_arguments_and_options(typed, completed, runs, monkeypatch):
    monkeypatch.setenv("_LLMQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"llmq {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    assert CliRunner().invoke(cli.app, [], prog_name="llmq").output.split() == [completed]


def test_the_doctor_names_what_is_missing_and_the_cure(monkeypatch):
    facts = doctor.facts()
    assert {"llmq", "processor", "features", "threads", "memory", "disk", "accelerator"} <= facts.keys()
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    (lack,) = doctor.lacks()
    assert lack.missing == ("nncf",)
    assert "quantize.int8" in lack.words
    assert lack.cure == "pip install 'llmq-suite[openvino]'"


def test_an_error_is_data_too_where_data_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llmq", "show", "quantize.bnbb", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, json.loads(out)["exit_code"]) == (2, 2)
    assert json.loads(out)["error"] in err


def test_an_error_about_an_override_cites_the_command_line():
    with pytest.raises(UserError, match=r"^command line: there is no file 'nope\.jsonl'"):
        api.load("text/quickstart", {"perplexity.data": "nope.jsonl"})


def test_finetune_and_quantize_measure_by_what_they_are_told():
    plain = api.finetuning("smollm2-135m", "pydoc", 4, False, None, None, api.asked_of(None, ["a", "b"], 5), 3)
    assert plain["evaluate"] == [{"lm_eval": {"tasks": ["a", "b"], "limit": 5}}]
    assert plain["seed"] == 3
    assert (
        api.quantizing("m", "rtn", None, "causal_lm", api.asked_of("text-full", None, None))["evaluate"] == "text-full"
    )
    with pytest.raises(UserError, match="--suite text-full and --tasks a exclude each other"):
        api.asked_of("text-full", "a", None)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"schema_version": 2, "stages": 7}'])
def test_a_report_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError):
        looking.show(str(tmp_path))


@pytest.mark.parametrize("change", ["better", "stage", "value"])
def test_a_figure_that_is_none_or_of_no_stage_is_one_line(change, tmp_path):
    write_run(tmp_path / "run", {"0-base": [size(1.0)], "1-quantize.bnb": [size(0.5)]})
    file = tmp_path / "run" / "report.json"
    told = json.loads(file.read_text())
    told["measurements"][0][change] = {"better": "up", "stage": "7-gone", "value": "1"}[change]
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match="is no whole run"):
        looking.show(str(tmp_path / "run"))


def test_a_closed_stream_is_written_to_nowhere_and_an_ascii_one_gets_one_sign_for_one(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", narrow)
    streams.prepare()
    print(told_row := "acc ↑  0.75 ± 0.1  1.13× ▼  京", file=sys.stderr, flush=True)
    print(told_row, flush=True)
    assert not sys.stdout.isatty()
    assert narrow.buffer.getvalue() == b"acc ^  0.75 ~ 0.1  1.13x -  \\u4eac\n"
    sys.stdout.close()


def test_lines_below_a_table_are_wrapped_on_a_terminal_and_whole_in_a_pipe(runs):
    report = Report.read(runs / "first")
    for is_terminal in (True, False):
        out = Console(file=io.StringIO(), width=60, force_terminal=is_terminal, color_system=None)
        screen.show(report, out)
        lines = out.file.getvalue().splitlines()
        assert any("[ ]: the 95 % interval of either." in line for line in lines) is not is_terminal
        assert max(map(len, lines)) <= 60 or not is_terminal

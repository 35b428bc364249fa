"""`import llmq`: the verbs of the command line, typed, with nothing heavy until one is called."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import llmq
from llmq import api, environment


@pytest.fixture(scope="module")
def report(tiny_llama, tmp_path_factory):
    recipe = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"quantize.rtn": {"bits": 8, "group_size": 32}}],
        "evaluate": ["size", {"perplexity": {"window": 32}}],
    }
    overrides = {"quantize.rtn.bits": 4, "perplexity.limit": 8, "perplexity.data": "pydoc"}
    return llmq.run(recipe, overrides, out=tmp_path_factory.mktemp("api") / "run")


def test_nothing_heavy_is_imported():
    script = "import llmq, sys; print([m for m in ('torch', 'rich', 'pydantic', 'yaml', 'typer') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_every_verb_is_named_once_and_documented():
    verbs = set(api.__all__)
    assert verbs <= set(llmq.__all__)
    for name in verbs:
        assert callable(getattr(llmq, name))
        assert inspect.getdoc(getattr(api, name))


def test_a_verb_that_is_a_folder_of_words_too_is_both(tiny_llama):
    from llmq.quantize import rtn

    assert llmq.quantize.rtn is rtn
    with pytest.raises(llmq.UserError, match=r"'quantize\.rtnn'"):
        llmq.quantize(tiny_llama, method="rtnn")


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="'llmq' has no attribute 'quantise'"):
        llmq.quantise  # noqa: B018


def test_overrides_by_key_are_folded_as_on_the_command_line(report):
    plain = json.loads((report.folder / "report.json").read_text())["recipe"]
    assert plain["steps"] == [{"quantize.rtn": {"bits": 4, "group_size": 32}}]
    assert plain["evaluate"][1] == {"perplexity": {"window": 32, "limit": 8, "data": "pydoc"}}


def test_overrides_of_a_recipe_that_was_read_before_are_folded_too(tiny_llama):
    plain = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": [{"quantize.rtn": {"bits": 8}}]}
    job = api.load(plain, name="mine")
    changed = api.load(job, {"quantize.rtn.bits": 4, "seed": 3})
    assert (changed.name, changed.steps[0].bits, changed.seed) == ("mine", 4, 3)
    assert api.load(job) is job


def test_a_report_is_rows_a_table_and_a_page(report):
    figures = {(m["stage"], m["metric"]): m["value"] for m in report.measurements}
    assert figures["1-quantize.rtn", "bytes_on_disk"] < figures["0-base", "bytes_on_disk"]
    assert "bytes_on_disk" in report.table()
    page = report._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "1-quantize.rtn" in page


def test_a_stage_is_opened_measured_judged_and_compared(report, tmp_path):
    stage = report.folder / "1-quantize.rtn"
    with llmq.open(stage) as loaded:
        assert loaded.processor("hello").input_ids
        assert loaded.module.config.model_type == "llama"
    again = llmq.evaluate(stage, suite=str(suite(tmp_path)), out=tmp_path / "eval")
    assert {m["stage"] for m in again.measurements} == {"1-quantize.rtn"}
    judged = llmq.gate(report.folder, "bytes_on_disk <= 100MB")
    assert (judged.passed, judged.verdict) == (True, "pass")
    assert {c.metric for _, c in llmq.compare(report.folder).comparisons} >= {"bytes_on_disk"}


def suite(folder):
    path = folder / "suite.yaml"
    path.write_text("- size\n")
    return path


def test_wrong_input_is_one_error_of_llmq(report, tmp_path):
    with pytest.raises(llmq.UserError, match="run of several stages"), llmq.open(report.folder):
        pass
    with pytest.raises(llmq.UserError, match="bits 3: 4, 8 or 16"):
        llmq.finetune("smollm2-135m", "pydoc", bits=3)
    with pytest.raises(llmq.UserError, match="unknown key 'stepz'"):
        llmq.run({"model": "causal_lm", "stepz": []})
    with pytest.raises(llmq.UserError, match="no rule to judge"):
        llmq.gate(report.folder)
    with pytest.raises(llmq.UserError, match="nothing to compare; name a run, or two results"):
        llmq.compare()
    with pytest.raises(llmq.UserError, match="override 'seed' is not of the form"):
        llmq.run({"model": "causal_lm"}, "seed")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"threads": 0}, "threads 0: a whole number above 0"),
        ({"threads": -1}, "threads -1: a whole number above 0"),
        ({"threads": 1.5}, "threads 1.5: a whole number above 0"),
        ({"device": "meta"}, "device 'meta' is not on this machine"),
        ({"device": None}, "device None is not on this machine"),
        ({"dtype": "int8"}, "dtype: 'int8' of models.causal_lm is wrong: input should be 'bfloat16'"),
    ],
)
def test_settings_that_no_machine_has_are_one_error_of_llmq(setting, said, tiny_llama, tmp_path):
    with pytest.raises(llmq.UserError, match=re.escape(said)):
        llmq.evaluate(tiny_llama, suite=str(suite(tmp_path)), out=tmp_path / "eval", **setting)


def test_no_training_leaves_its_determinism_to_the_next():
    from transformers.trainer_utils import enable_full_determinism

    from llmq.text.training import _environment_kept

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, dict(os.environ)
    with torch.random.fork_rng(), _environment_kept():
        enable_full_determinism(0)
    after = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, dict(os.environ)
    assert after == before


def test_no_call_leaves_its_threads_to_the_next():
    before = torch.get_num_threads()
    try:
        for asked, there in ((None, before), (before + 1, before + 1), (before + 2, before + 2), (None, before)):
            environment.prepare("cpu", 0, asked)
            assert torch.get_num_threads() == there
        environment.prepare("cpu", 0, before + 1)
        torch.set_num_threads(before + 2)  # by the user, since then
        environment.prepare("cpu", 0, None)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1.0e-05"), (None, "null"), ("a: b", "'a: b'"), (["x", 2], "[x, 2]"), ({"k": True}, "{k: true}")],
)
def test_values_are_written_as_yaml_and_read_back(value, text):
    from llmq.source import to_flow, value_of

    assert to_flow(value) == text
    assert value_of(text) == value

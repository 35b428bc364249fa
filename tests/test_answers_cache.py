"""Answers are kept from run to run, and none is taken for the answer to anything else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import CPU, apply, base_of

from llmq import answers, environment, pipeline, plugin, questions
from llmq.harness import sources as harness_sources
from llmq.report import Report
from llmq.types import Attachment, Exhibit, Measurement, Samples

PERPLEXITY = {"data": "pydoc", "limit": 2, "window": 32}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


@pytest.fixture
def model(tiny_llama, tmp_path):
    """The tiny model in a folder that may be changed."""
    return base_of(shutil.copytree(tiny_llama, tmp_path / "model"))


def task(**settings):
    return plugin.build({"perplexity": {**PERPLEXITY, **settings}}, "tasks")


def ask(artifact, asked=None, keep=True, device="cpu"):
    """The answers of one task, and whether they were there already."""
    with answers.AnswerCache(artifact, artifact, device, keep) as interview:
        found = list(interview.score("perplexity", asked or task()))
        return found, bool(interview.reused)


def test_the_same_question_is_asked_once_and_the_model_not_even_opened(model, kept, monkeypatch):
    first, reused = ask(model)
    assert not reused
    monkeypatch.setattr(type(model.model), "open", lambda *a: pytest.fail("opened"))
    second, reused = ask(model)
    assert reused
    assert second == first
    assert [m.samples for m in second] == [m.samples for m in first]


def test_without_the_cache_nothing_is_read_and_nothing_kept(model, kept):
    ask(model, keep=False)
    assert not kept.exists()
    ask(model)
    assert not ask(model, keep=False)[1]


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_any_file_of_the_model_counts(model, kept):
    ask(model)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        file = model.weights / name
        before = file.read_bytes()
        if file.suffix == ".safetensors":
            flip(file)
        else:
            file.write_text(json.dumps(json.loads(before), indent=7))
        assert not ask(model)[1], name
        file.write_bytes(before)
        assert ask(model)[1], name
    (model.weights / "chat_template.jinja").write_text("{{ 'x' }}")
    assert not ask(model)[1]


def test_what_llmq_wrote_beside_the_model_does_not_count(model, kept):
    ask(model)
    (model.weights / "measurements.json").write_text("{}")
    (model.weights / "samples").mkdir()
    (model.weights / "samples/x.jsonl").write_text("1")
    assert ask(model)[1]


def test_an_adapter_counts_with_all_of_its_files(model, kept, tmp_path, tiny_jsonl):
    settings = {"r": 4, "max_length": 64, "max_steps": 1, "per_device_train_batch_size": 2}
    adapted = apply("adapt.lora", model, tmp_path / "a", data=str(tiny_jsonl), **settings)
    ask(model)
    assert not ask(adapted)[1]
    assert ask(adapted)[1]
    flip(adapted.adapter / "adapter_model.safetensors")
    assert not ask(adapted)[1]


@pytest.mark.parametrize(
    "settings", [{"limit": 3}, {"window": 64}, {"data": {"pydoc": {"held_out": 0.2}}}, {"bos": False}]
)
def test_every_setting_counts(model, kept, settings):
    ask(model)
    assert not ask(model, task(**settings))[1]
    assert ask(model, task(**settings))[1]


def test_the_rows_of_the_data_count(model, kept, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One text.\n\n" * 50)
    asked = task(data={"file": {"path": str(file), "held_out": 0}}, part="all")
    ask(model, asked)
    assert ask(model, asked)[1]
    file.write_text("Two text.\n\n" * 50)
    assert not ask(model, asked)[1]


def test_how_the_model_is_opened_counts(model, kept):
    ask(model)
    assert not ask(replace(model, model=model.model.model_copy(update={"dtype": "float32"})))[1]
    assert not ask(replace(model, packed=True))[1]


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "tokenizers", "bitsandbytes", "lm-eval", "jinja2", "pillow", "sacrebleu"]
)
def test_every_library_counts(model, kept, monkeypatch, name):
    ask(model)
    stock = environment.library_version
    monkeypatch.setattr(environment, "library_version", lambda n: "0.0" if n == name else stock(n))
    assert not ask(model)[1]


def test_device_processor_threads_seed_and_our_own_code_count(model, kept, monkeypatch):
    before = torch.get_num_threads(), torch.initial_seed()
    ask(model)
    try:
        torch.set_num_threads(before[0] + 1)
        assert not ask(model)[1]
        torch.set_num_threads(before[0])
        torch.manual_seed(before[1] + 1)
        assert not ask(model)[1]
    finally:
        torch.set_num_threads(before[0])
        torch.manual_seed(before[1])
    assert ask(model)[1]
    for name, value in (("processor", lambda device: "another"), ("platform", None)):
        with monkeypatch.context() as patch:
            if value:
                patch.setattr(environment, name, value)
            else:
                patch.setattr(answers.platform, "python_version", lambda: "3.0")
            assert not ask(model)[1], name
    monkeypatch.setattr(answers, "own_code", lambda: "changed")
    assert not ask(model)[1]
    assert answers.machine("cpu")["device"] == "cpu"


def test_every_fact_of_an_answer_is_part_of_its_place(model, kept):
    """Whatever is changed in the facts, however deep: another place."""
    facts = {
        "task": answers.settings(task()),
        "depends": task().depends(),
        "models": (answers.describe(model),),
        "machine": answers.machine("cpu"),
    }
    plain = json.loads(answers._text(facts))
    seen = {answers.place(plain)}

    def leaves(node, path=()):
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        if not children:
            yield path
        for key, child in children:
            yield from leaves(child, (*path, key))

    paths = list(leaves(plain))
    assert len(paths) > 25
    for path in paths:
        changed = json.loads(json.dumps(plain))
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = f"another than {node[path[-1]]}"
        seen.add(answers.place(changed))
    assert len(seen) == len(paths) + 1


def test_a_file_that_holds_other_facts_or_half_an_answer_is_not_believed(model, kept):
    first, _ = ask(model)
    (file,) = kept.glob("*.json")
    data = json.loads(file.read_text())
    for text in ("{", "[]", json.dumps({**data, "facts": {}}), json.dumps({"facts": data["facts"]})):
        file.write_text(text)
        again, reused = ask(model)
        assert not reused
        assert again == first
    assert ask(model)[1]


def test_every_kind_of_answer_comes_back_as_it_was(kept):
    given = [
        Measurement("t", "acc", 0.1 + 0.2, "share", "higher", 3, None, "c", Samples((0.1, 1 / 3), (1.0, 2.0), "exp")),
        Exhibit("t", "title", "in", "out", picture=b"\x89PNG\x00"),
        Attachment("t", "lm_eval/x.json", "text é"),
    ]
    answers.write({"a": 1}, given)
    back = answers.read({"a": 1})
    assert back == given
    assert back[0].samples == given[0].samples
    assert back[1].picture == given[1].picture
    assert back[2].text == given[2].text
    assert answers.read({"a": 2}) is None


def test_answers_whose_names_make_one_file_name_have_files_of_their_own(tmp_path):
    pictures = [Exhibit("t", title, "in", "", picture=title.encode()) for title in ("a b", "a-b", "A b", "c")]
    questions._keep(pictures, [], [], {}, tmp_path / "0-base", {})
    shown = json.loads((tmp_path / "0-base/measurements.json").read_text())["exhibits"]
    assert {e["title"]: (tmp_path / e["file"]).read_bytes().decode() for e in shown} == {
        title: title for title in ("a b", "a-b", "A b", "c")
    }
    assert shown[-1]["file"] == "0-base/pictures/t-c.png"
    scored = [Measurement(t, "acc", 0.5, "share", "higher", 1, None, "c", Samples((0.5,))) for t in ("x y", "x_y", "z")]
    questions.write_samples(scored, tmp_path / "samples")
    assert len(list((tmp_path / "samples").iterdir())) == len(scored)
    assert (tmp_path / "samples/z.acc.jsonl").exists()


@pytest.mark.slow
def test_a_report_says_what_was_reused_and_speed_never_is(model, kept, tmp_path):
    tasks = [
        plugin.build(t, "tasks")
        for t in ("size", {"perplexity": PERPLEXITY}, {"speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 3}})
    ]
    reports = [pipeline.evaluate({"0-base": model}, tasks, tmp_path / n, CPU, {}) for n in ("a", "b")]
    pipeline.evaluate({"0-base": model}, tasks, tmp_path / "c", CPU, {}, cache=False)
    told = [Report.read(tmp_path / n).stages[0]["reused"] for n in ("a", "b", "c")]
    assert told == [[], ["perplexity"], []]
    assert "kept from an earlier run: perplexity" in (tmp_path / "b/report.md").read_text()
    assert "kept from an earlier run" not in (tmp_path / "a/report.md").read_text()
    timed = [[m for m in r.measurements if m["task"] == "speed"] for r in reports]
    assert timed[0]
    assert timed[0] != timed[1]
    assert not [t for t in ("size", "speed") if plugin.load(f"tasks.{t}")().depends() is not None]


@pytest.mark.slow
def test_the_questions_of_lm_eval_are_kept_with_its_files(model, kept, tmp_path, monkeypatch):
    # What other tests opened, a person's code as they are, is none of this task's: /proc/self changes all the time.
    monkeypatch.setattr(harness_sources, "_opened", set())
    asked = [plugin.build({"lm_eval": {"tasks": ["pydoc_continuation"], "limit": 3}}, "tasks")]
    for name in ("a", "b"):
        torch.manual_seed(0)  # on which lm-eval's answers depend
        pipeline.evaluate({"0-base": model}, asked, tmp_path / name, CPU, {})
    assert Report.read(tmp_path / "b").stages[0]["reused"] == ["lm_eval"]
    first, second = ({f.name: f.read_text() for f in (tmp_path / n / "0-base/lm_eval").iterdir()} for n in ("a", "b"))
    assert first == second
    assert len(first) == 2


def test_a_cache_that_takes_nothing_is_said_once_and_costs_nothing(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the cache should be")
    monkeypatch.setenv("LLMQ_CACHE", str(blocked))
    answers._say_unkept.cache_clear()
    for facts in ({"a": 1}, {"a": 2}):
        assert answers.read(facts) is None
        answers.write(facts, [])
    said = capsys.readouterr().err
    assert said.startswith("  answers are not kept for other runs: ")
    assert str(blocked) in said
    assert said.count("\n") == 1

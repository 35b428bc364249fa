"""The model card of a stage: parsed by the hub's own library, without a path of the machine, outside of every hash."""

import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from run_folders import size, write_run

import llmq
from llmq.judge.replay import verify
from llmq.report import Report, card


@pytest.fixture(scope="module")
def run(tiny_llama, tiny_jsonl, tmp_path_factory):
    home = tmp_path_factory.mktemp("cards")
    base = shutil.copytree(tiny_llama, home / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    recipe = {
        "model": {"causal_lm": {"weights": str(base)}},
        "steps": [{"quantize.rtn": {"group_size": 32}}, {"adapt.lora": {"data": str(tiny_jsonl), "max_steps": 1}}],
        "evaluate": ["size"],
    }
    return llmq.run(recipe, out=home / "run").folder


def test_every_stage_that_holds_a_model_has_a_card_that_the_hub_reads(run):
    read = ModelCard.load(run / "1-quantize.rtn/README.md")
    assert (read.data.license, read.data.pipeline_tag, read.data.base_model) == ("mit", "text-generation", None)
    figures = {r.metric_type: r.metric_value for r in read.data.eval_results}
    files = (run / "1-quantize.rtn").glob("*.safetensors")
    assert figures["bytes_on_disk"] == sum(f.stat().st_size for f in files)
    assert "quantize.rtn" in read.text
    assert (run / "2-adapt.lora/README.md").is_file()
    assert not (run / "0-base/README.md").exists()


def test_no_path_of_the_machine_is_in_it(run):
    for file in run.glob("*/README.md"):
        assert str(run.parent) not in file.read_text()
        assert "/tmp" not in file.read_text()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"causal_lm": {"weights": "org/name"}}, "org/name"),
        ({"causal_lm": {"weights": "smollm2-135m"}}, None),  # a word of llmq
        ({"timm_classifier": {"architecture": "resnet10t"}}, None),
        ({"exported": {"weights": "digits/model.onnx"}}, None),
    ],
)
def test_only_an_id_of_the_hub_is_named_as_the_base(model, named, tmp_path):
    report = replace(Report.read(write_run(tmp_path / "run", {"0-base": [size(2.0)]})), recipe={"model": model})
    text = card.draw(report, report.stages[0], tmp_path, "causal-lm")
    assert ModelCard(text).data.base_model == named


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% for m in messages %}<s>{{ m }}</s></b></c>{{ x }}", ...),
        ("word " * 200, ...),
        ("either/or/and not", ...),
        ("org/name", ...),
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("../up/rows.jsonl", "rows.jsonl"),
        ("some/where/rows.jsonl", "rows.jsonl"),
    ],
)
def test_the_recipe_in_a_card_loses_folders_and_no_other_text(text, told):
    assert card._portable({"a": [text]}) == {"a": [text if told is ... else told]}


def test_a_card_is_edited_freely(run):
    file = run / "1-quantize.rtn/README.md"
    file.write_text(file.read_text() + "More.\n")
    assert verify(run).whole
    assert not verify(run).added


def test_a_run_that_measured_nothing_ends_with_cards(tiny_llama, tmp_path):
    steps = [{"quantize.rtn": {"group_size": 32}}]
    recipe = {"model": {"causal_lm": {"weights": str(tiny_llama)}}, "steps": steps, "evaluate": []}
    card = llmq.run(recipe, out=tmp_path / "run").folder / "1-quantize.rtn/README.md"
    assert "## Measured\n\nNothing." in card.read_text()

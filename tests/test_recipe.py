"""Recipes: overrides, line numbers, bare words, and the order of steps folded before anything runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmq import plugin, recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.recipe import Source, apply_override, check_order

TEXT = """\
model:
  causal_lm: {weights: org/name}
steps:
  - quantize.bnb: {bits: 4}
  - adapt.lora:
      data: pydoc
      r: 16
evaluate:
  - size
seed: 0
"""
HERE = Source("here", {})


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads recipe text with overrides; the file is `r.yaml` in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str = TEXT, *overrides: str) -> recipe.Recipe:
        Path("r.yaml").write_text(text)
        return recipe.load("r.yaml", overrides)

    return loaded


def steps(*words: str) -> list:
    """Steps with their default settings."""
    settings = {"adapt.lora": {"data": "pydoc"}}
    return [plugin.build({word: settings.get(word, {})}) for word in words]


# Overrides


def test_an_override_reaches_a_steps_setting(load):
    assert load(TEXT, "adapt.lora.r=32").steps[1].r == 32


def test_an_override_reaches_the_model(load):
    assert load(TEXT, "model.weights=other/model").model.weights == "other/model"


def test_an_override_reaches_the_recipes_own_keys(load):
    job = load(TEXT, "seed=1", "stages=ends", "evaluate=text-quick")
    assert (job.seed, job.stages) == (1, "ends")
    assert len(job.evaluate) > 1


def test_an_override_may_name_a_data_file(load, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = load(TEXT, "adapt.lora.data=my.jsonl").steps[1].data
    assert (data.word, data.path) == ("data.file", Path("my.jsonl"))


def test_an_override_goes_into_nested_settings(load):
    data = load(TEXT, "adapt.lora.data.pydoc.held_out=0.2").steps[1].data
    assert (data.word, data.held_out) == ("data.pydoc", 0.2)


def test_an_override_keeps_what_stands_beside_it(load):
    assert load(TEXT, "quantize.bnb.double_quant=false").steps[0].model_dump(include={"bits", "double_quant"}) == {
        "bits": 4,
        "double_quant": False,
    }


def test_an_override_gives_settings_to_a_bare_word(load):
    text = TEXT.replace("quantize.bnb: {bits: 4}", "quantize.bnb")
    assert load(text, "quantize.bnb.bits=8").steps[0].bits == 8


def test_a_later_override_wins(load):
    assert load(TEXT, "seed=1", "seed=2").seed == 2


def test_an_override_of_epochs_takes_the_place_of_steps():
    """The recipe sets max_steps, beside which epochs would do nothing."""
    name = "text/lora"
    (step,) = recipe.load(name, ["adapt.lora.num_train_epochs=3"]).steps
    assert (step.max_steps, step.num_train_epochs) == (None, 3)
    with pytest.raises(UserError, match="num_train_epochs has no effect with max_steps 5"):
        recipe.load(name, ["adapt.lora.max_steps=5", "adapt.lora.num_train_epochs=3"])


def test_the_value_of_an_override_may_hold_an_equals_sign(load):
    assert load(TEXT, "model.revision=a=b").model.revision == "a=b"


def test_an_override_is_yaml(load):
    lora = load(TEXT, "adapt.lora.target_modules=[q_proj, v_proj]", "adapt.lora.learning_rate=1e-4").steps[1]
    assert lora.target_modules == ("q_proj", "v_proj")
    assert lora.learning_rate == 1e-4


def test_a_number_with_an_exponent_is_a_number_everywhere(load):
    """YAML 1.1 wants a point in 1e-7; in a free mapping no field makes a number of the text."""
    more = "{adam_epsilon: 1e-7, adam_beta2: 9.5E-1}"
    lora = load(TEXT, f"adapt.lora.training_arguments={more}").steps[1]
    assert lora.training_arguments == {"adam_epsilon": 1e-7, "adam_beta2": 0.95}
    assert load(TEXT, "model.revision='1e7'").model.revision == "1e7"
    with pytest.raises(UserError, match="'adam_epsilon' is '1e-7', and not a number"):
        load(TEXT, "adapt.lora.training_arguments={adam_epsilon: '1e-7'}").steps[1].with_arguments_folded_in()


def test_what_only_old_yaml_takes_for_a_number_is_read_as_it_is_written(load):
    # YAML 1.1 takes 2:4 for two minutes and four seconds, and 010 for 8.
    job = load("model: {causal_lm: {weights: org/name}}\nsteps:\n- prune.wanda: {pattern: 2:4}\nseed: 010\n")
    assert (job.steps[0].pattern, job.seed) == ("2:4", 10)
    assert load(TEXT, "adapt.lora.r=012").steps[1].r == 12


@pytest.mark.parametrize(("said", "told"), [("yes", "true"), ("on", "true"), ("False", "false")])
@pytest.mark.parametrize("key", ["adapt.lora.r", "adapt.lora.lora_dropout", "adapt.lora.max_steps", "seed"])
def test_a_truth_is_no_number(load, key, said, told):
    name = key.rpartition(".")[2]
    with pytest.raises(UserError, match=f"command line: '{name}'.*: {told} .*is no number"):
        load(TEXT, f"{key}={said}")


def test_what_overrides_change_is_what_the_recipe_says(load):
    plain = load(TEXT, "adapt.lora.r=32", "seed=3").plain()
    assert plain["steps"][1]["adapt.lora"] == {"data": "pydoc", "r": 32}
    assert plain["seed"] == 3


def test_an_override_alone_makes_no_step():
    with pytest.raises(UserError, match=r"this recipe has no 'adapt\.lora'"):
        apply_override(Source("here", {"steps": ["quantize.bnb"]}), "adapt.lora.r=1")


# Places


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("bits: 4", "bits: 3", "r.yaml:4: "),
        ("r: 16", "r: -1", "r.yaml:7: "),
        ("data: pydoc", "data: no.jsonl", "r.yaml:5: "),
        ("- size", "- sizes", "r.yaml:9: "),
        ("seed: 0", "seed: x", "r.yaml:10: "),
        ("org/name", "name", "r.yaml:2: "),
        ("seed: 0", "sede: 0", "r.yaml:10: "),
    ],
)
def test_an_error_names_the_line(load, old, new, place):
    with pytest.raises(UserError) as error:
        load(TEXT.replace(old, new))
    assert str(error.value).startswith(place)


def test_an_error_in_an_override_names_the_command_line(load):
    with pytest.raises(UserError, match=r"^command line: r: 0 of adapt\.lora is wrong"):
        load(TEXT, "adapt.lora.r=0")


def test_an_error_in_a_suite_names_the_line_of_the_suite(load, tmp_path):
    (tmp_path / "s.yaml").write_text("# a comment\n- size\n- speed: {rounds: 0}\n")
    with pytest.raises(UserError, match=r"^s\.yaml:3: rounds: 0 of tasks\.speed is wrong"):
        load(TEXT.replace("evaluate:\n  - size", "evaluate: s.yaml"))


def test_the_innermost_known_place_is_named():
    source = Source("f", {}, {(): 1, ("a",): 2, ("a", "b"): 3, ("c",): -1})
    assert source.where(("a", "b", "x")) == "f:3"
    assert source.where(("a", "x")) == "f:2"
    assert source.where(("x",)) == "f:1"
    assert source.where(("c", "x")) == "command line"
    assert Source("f", {}).where(("a",)) == "f"


# Words


def test_a_word_alone_stands_for_its_defaults(load):
    text = TEXT.replace("quantize.bnb: {bits: 4}", "quantize.bnb")
    assert load(text).steps[0] == plugin.build("quantize.bnb")
    assert load(text.replace("quantize.bnb", "quantize.bnb:")).steps[0] == plugin.build("quantize.bnb")


def test_a_recipe_says_only_what_was_set(load):
    assert load().plain() == {
        "model": {"causal_lm": {"weights": "org/name"}},
        "steps": [{"quantize.bnb": {"bits": 4}}, {"adapt.lora": {"data": "pydoc", "r": 16}}],
        "evaluate": ["size"],
        "seed": 0,
    }


def test_a_recipe_cannot_be_changed(load):
    job = load()
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        job.steps[0].bits = 8


def test_nothing_to_do_is_a_recipe_too(load):
    job = load("model: {causal_lm: {weights: org/name}}\n")
    assert (job.steps, job.evaluate, job.seed) == ((), (), 0)


# Order


@pytest.mark.parametrize(
    "words",
    [
        ("quantize.bnb",),
        ("adapt.lora",),
        ("quantize.bnb", "adapt.lora"),
        ("quantize.bnb", "adapt.lora", "adapt.merge"),
        ("adapt.lora", "adapt.merge", "quantize.bnb"),
        ("quantize.bnb", "adapt.lora", "adapt.merge", "quantize.bnb", "adapt.lora"),
    ],
    ids=" ".join,
)
def test_orders_that_work(words):
    check_order("causal-lm", steps(*words), HERE)


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("quantize.bnb", "quantize.bnb"), "needs float weights"),
        (("quantize.bnb", "adapt.lora", "quantize.bnb"), "needs float weights"),
        (("adapt.lora", "quantize.bnb"), "put adapt.merge before it"),
        (("adapt.lora", "adapt.lora"), "put adapt.merge before it"),
        (("adapt.merge",), "put adapt.lora before it"),
        (("adapt.lora", "adapt.merge", "adapt.merge"), "put adapt.lora before it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_orders_that_cannot_work(words, cure):
    with pytest.raises(UserError, match=f"'{words[-1]}' .*{cure}"):
        check_order("causal-lm", steps(*words), HERE)


@pytest.mark.parametrize(
    ("before", "cure"),
    [
        ({"quantize.bnb": {}}, "codes of bitsandbytes; quantize by quantize.gptq"),
        ({"quantize.rtn": {"bits": 3}}, "3 bits: vLLM reads 4 and 8"),
        ({"quantize.rtn": {"modules": {"q_proj": {"bits": 2}}}}, "2 bits"),
        ({"quantize.gptq": {"static_groups": False}}, "act order; quantize with static_groups: true"),
    ],
    ids=str,
)
def test_weights_that_an_export_has_no_place_for_are_seen_before_they_are_made(before, cure):
    with pytest.raises(UserError, match=f"'export.compressed_tensors' has no place for .*{cure}"):
        check_order("causal-lm", [*map(plugin.build, (before, "export.compressed_tensors"))], HERE)
    fine = {"quantize.rtn": {"bits": 3, "modules": {"layers": {"bits": 4}}}}
    check_order("causal-lm", [*map(plugin.build, (fine, "export.compressed_tensors"))], HERE)


def test_a_base_that_is_packed_already_counts():
    base = replace(Artifact(None, Path()), packed=True)
    with pytest.raises(UserError, match="needs float weights"):
        check_order("causal-lm", steps("quantize.bnb"), HERE, base)


def test_a_step_that_does_not_suit_the_model_is_refused():
    with pytest.raises(UserError, match=r"'quantize\.bnb' suits .*causal-lm, and this model is a detector"):
        check_order("detector", steps("quantize.bnb"), HERE)


def test_a_task_that_does_not_suit_the_model_is_refused():
    with pytest.raises(UserError, match=r"'tasks\.speed' suits .*causal-lm.*, and this model is a kite"):
        recipe.suite_tasks(["speed"], HERE, "kite")


def test_of_two_steps_of_one_word_an_override_names_one_by_its_stage():
    name = "vision/digits-prune-int8"
    first, _, second = recipe.load(name, ["3-adapt.train.max_steps=7"]).steps[:3]
    assert (first.max_steps, second.max_steps) == (None, 7)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"2 steps 'adapt\.train'; write 1-adapt\.train or 3-adapt\.train"):
        recipe.load(name, ["adapt.train.max_steps=7"])


# Overrides of tasks


def test_an_override_reaches_a_task_of_a_named_suite(load):
    text = TEXT.replace("evaluate:\n  - size", "evaluate: text-quick")
    made = load(text, "perplexity.limit=32", "tasks.speed.rounds=3")
    by_name = {task.name: task for task in made.evaluate}
    assert (by_name["perplexity"].limit, by_name["speed"].rounds) == (32, 3)  # type: ignore[attr-defined]
    assert made.plain()["evaluate"][1] == {"perplexity": {"data": "pydoc", "limit": 32}}


def test_an_override_names_the_data_of_a_task(load, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    made = load(TEXT.replace("  - size", "  - perplexity"), "perplexity.data=my.jsonl")
    assert made.evaluate[0].data.path == Path("my.jsonl")  # type: ignore[attr-defined]


def test_what_is_wrong_in_an_overridden_suite_is_named_where_it_stands(load, tmp_path):
    (tmp_path / "s.yaml").write_text("# a comment\n- size\n- speed: {rounds: 0}\n- perplexity\n")
    text = TEXT.replace("evaluate:\n  - size", "evaluate: s.yaml")
    with pytest.raises(UserError, match=r"^s\.yaml:3: rounds: 0 of tasks\.speed is wrong"):
        load(text, "perplexity.limit=3")
    with pytest.raises(UserError, match=r"^command line: unknown key 'windows' of tasks\.perplexity; did you mean"):
        load(text, "speed.rounds=2", "perplexity.windows=8")


def test_of_two_tasks_of_one_word_an_override_names_one_by_its_place(load):
    text = TEXT.replace("  - size", "  - perplexity: {window: 8}\n  - perplexity: {window: 9}")
    assert [t.limit for t in load(text, "perplexity-2.limit=3").evaluate] == [None, 3]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"2 tasks 'perplexity'; write perplexity-1 or perplexity-2"):
        load(text, "perplexity.limit=3")


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("perplexty.limit=3", "this recipe has no 'perplexty'; did you mean 'perplexity'"),
        ("detection.limit=3", "this recipe has no 'detection'"),
        ("perplexity=3", "perplexity is a word with settings; write perplexity.KEY=VALUE"),
        ("model.weights.x=3", "weights: .* of models.causal_lm is wrong: input should be a valid string"),
        ("perplexity.data.digits.seed=1", "^command line: 'data.digits' suits classifier"),
        ("adapt.lra.r=3", "this recipe has no 'adapt.lra'; did you mean 'adapt.lora'"),
    ],
)
def test_an_override_of_nothing_is_one_line(load, override, cure):
    with pytest.raises(UserError, match=cure):
        load(TEXT.replace("evaluate:\n  - size", "evaluate: text-quick"), override)


def test_the_suite_is_chosen_before_its_tasks_are_changed(load):
    made = load(TEXT, "perplexity.limit=3", "evaluate=text-quick")
    assert [t.limit for t in made.evaluate if t.name == "perplexity"] == [3]  # type: ignore[attr-defined]


def test_an_override_changes_the_data_that_stands_there(load, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"q": "a", "completion": "b"}\n')
    text = TEXT.replace("pydoc", "my.jsonl")
    data = load(text, "adapt.lora.data.columns.prompt=q").steps[1].data  # type: ignore[attr-defined]
    assert (data.path, data.columns) == (Path("my.jsonl"), {"prompt": "q"})
    other = load(TEXT, "adapt.lora.data.docstrings.held_out=0.2").steps[1].data  # type: ignore[attr-defined]
    assert (other.word, other.held_out) == ("data.docstrings", 0.2)

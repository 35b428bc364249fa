"""Every YAML file that ships: it loads, it introduces itself, and what it says survives being written down."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmq import pipeline, plugin, reading, recipe
from llmq.files import bundled
from llmq.sweeping.spec import load, recipe_of, settings_of
from llmq.text import weights

RECIPES = recipe.names("recipes")
SWEEPS = recipe.names("sweeps")
SUITES = recipe.names("evals")
FILES = sorted(file for kind in ("recipes", "sweeps", "evals") for file in bundled(kind).rglob("*.yaml"))
TASK_FILES = sorted((bundled("evals") / "lm_eval").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _what_recipes_ask_for(monkeypatch, tmp_path):
    """To check a recipe, packages with weights need not be installed, nor rock or an exported net be there."""
    monkeypatch.setattr(weights, "built_in", lambda word: tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("DRSRD1_2D").mkdir()
    Path("digits").mkdir()
    Path("digits/model.onnx").touch()


def comments(file: Path) -> list[str]:
    """The comment lines that a file begins with."""
    lines = file.read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def test_every_yaml_is_found():
    assert len(RECIPES) > 0
    assert len(SUITES) > 0
    assert len(TASK_FILES) > 0
    assert set(FILES) == {*RECIPES.values(), *SWEEPS.values(), *SUITES.values(), *TASK_FILES}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_loads_every_run_and_tells_its_own_story(name):
    asked = load(name)
    jobs = [recipe_of(asked, settings) for settings in settings_of(asked)]
    assert len(jobs) > 2
    assert len({str(job.plain()) for job in jobs}) == len(jobs)
    what, needs, expect = comments(SWEEPS[name])[:3]
    assert re.fullmatch(r"# What:   \S.*\.", what)
    assert re.search(rf"# Needs:  \S.* Run: llmq sweep {re.escape(name)}$", needs)
    assert re.match(r"# Expect: \S.*", expect)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_measures_something(name):
    job = recipe.load(name)
    assert job.name == Path(name).name
    assert job.steps
    assert job.evaluate


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_tells_its_own_story(name):
    what, needs, expect = comments(RECIPES[name])[:3]
    assert re.fullmatch(r"# What:   \S.*\.", what)
    assert re.match(r"# Needs:  \S.*", needs)
    assert re.search(rf"Run: llmq run {re.escape(name)}( |$)", needs)
    assert re.match(r"# Expect: \S.*", expect)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_in_a_recipes_head_is_accepted(name):
    Path("my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    command = comments(RECIPES[name])[1].split("Run: llmq run ")[1].split()
    recipe.load(command[0], command[1:])


def test_to_check_a_recipe_takes_no_heavy_library():
    code = """
import sys
from llmq import recipe
from llmq.errors import UserError
for name in recipe.names("recipes"):
    try:
        recipe.load(name)
    except UserError as error:
        assert "there is no" in str(error) or "install" in str(error), error
print(*sorted({"torch", "transformers", "peft", "datasets", "openvino"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr + done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_written_down_is_the_same_recipe(name, tmp_path):
    job = recipe.load(name)
    file = tmp_path / f"{job.name}.yaml"
    file.write_text(pipeline.to_yaml(job.plain()))
    again = recipe.load(str(file))
    assert again == job
    assert again.plain() == job.plain()


DEMOS = {"perplexity": "pydoc", "accuracy": "photographs", "detection": "scenes"}
DEMOS |= dict.fromkeys(("super_resolution", "rock", "fidelity"), "rock")


def test_what_bundled_recipes_are_measured_on_is_what_their_figures_were_taken_on():
    seen = set()
    for name, file in RECIPES.items():
        if isinstance(yaml.safe_load(file.read_text())["evaluate"], str):
            for task in recipe.load(name).evaluate:
                for data in reading.data_of(task):
                    assert reading.called(data) == f"data.{DEMOS[task.name]}", name
                    seen.add(task.name)
    assert seen == set(DEMOS)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_loads_for_some_kind_of_model(name):
    written = yaml.safe_load(SUITES[name].read_text())
    classes = [plugin.load(f"tasks.{plugin.name_and_settings(entry)[0]}") for entry in written]
    kinds = set.intersection(*(set(cls.suits) for cls in classes))
    assert kinds
    for kind in kinds:
        assert len(recipe.suite_tasks(name, recipe.Source("test", {}), kind)) == len(written)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_tells_its_own_story(name):
    what, needs = comments(SUITES[name])[:2]
    assert re.fullmatch(r"# What:   \S.*\.", what)
    assert re.match(r"# Needs:  \S.*\.", needs)


@pytest.mark.parametrize("file", TASK_FILES, ids=lambda file: file.stem)
def test_a_task_for_lm_eval_is_named_as_its_file_and_its_functions_are_there(file):
    node = yaml.compose(file.read_text(), yaml.SafeLoader)
    settings = {key.value: value for key, value in node.value}
    assert settings["task"].value == file.stem
    functions = [value.value.split(".") for value in settings.values() if value.tag == "!function"]
    assert functions
    for module, function in functions:
        tree = ast.parse((file.parent / f"{module}.py").read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}

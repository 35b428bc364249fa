"""The command line: what the light commands answer, and how quickly."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmq import cli, plugin, recipe
from llmq.text import weights

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def llmq(tmp_path, monkeypatch, capsys) -> Run:
    """Runs a command line in an empty folder; its standard output and error, if it ended well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "built_in", lambda word: tmp_path)

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["llmq", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        out, err = capsys.readouterr()
        return out, err

    return run


def in_a_process(code: str) -> str:
    """What Python says when it runs `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_names_every_command_and_the_exit_codes(llmq):
    out, err = llmq("--help")
    assert err == ""
    for command in ("run", "finetune", "quantize", "eval", "check", "list", "show", "copy"):
        assert f"\n  {command} " in out
    assert "Exit codes: 0 done, 2 wrong input, 4 the job failed." in out


def test_no_word_at_all_is_a_call_for_help(llmq):
    assert llmq() == llmq("--help")


def test_list_shows_every_word_recipe_and_suite(llmq):
    out, err = llmq("list")
    assert err == ""
    for name in (*plugin.words(), *recipe.names("recipes"), *recipe.names("evals")):
        assert f"\n  {name} " in out


def test_list_as_data(llmq):
    found = json.loads(llmq("list", "--json")[0])
    assert found["words"] == plugin.words()
    assert set(found["recipes"]) == set(recipe.names("recipes"))
    assert set(found["evals"]) == set(recipe.names("evals"))
    assert all(what.endswith(".") for kind in found.values() for what in kind.values())


def test_show_a_word(llmq):
    out, _ = llmq("show", "quantize.bnb")
    assert out.startswith("quantize.bnb: 4-bit NF4 or FP4")
    for name in plugin.load("quantize.bnb").model_fields:
        assert f"\n  {name} " in out
    assert "= 'nf4'" in out


@pytest.mark.parametrize("word", plugin.words())
def test_every_word_can_be_shown(llmq, word):
    assert plugin.words()[word] in llmq("show", word)[0]
    assert json.loads(llmq("show", word, "--json")[0])["properties"].keys() == plugin.load(word).model_fields.keys()


def test_show_says_which_settings_are_needed(llmq):
    (line,) = (line for line in llmq("show", "adapt.lora")[0].splitlines() if line.startswith("  data "))
    assert "needed" in line


def test_show_a_recipe_is_its_file_to_the_letter(llmq):
    assert llmq("show", "text/quickstart")[0] == recipe.names("recipes")["text/quickstart"].read_text()


def test_copy_makes_a_recipe_of_ones_own(llmq):
    out, _ = llmq("copy", "text/quickstart", "mine/recipes")
    copied = Path("mine/recipes/quickstart.yaml")
    assert copied.read_text() == recipe.names("recipes")["text/quickstart"].read_text()
    assert f"llmq run {copied}" in out
    assert llmq("check", str(copied))[0] == llmq("check", "text/quickstart")[0]


def test_check_writes_the_recipe_out_and_says_that_it_is_ready(llmq):
    out, err = llmq("check", "text/quickstart", "adapt.lora.r=32", "seed=7")
    plain = yaml.safe_load(out)
    assert plain == json.loads(json.dumps(recipe.load("text/quickstart", ["adapt.lora.r=32", "seed=7"]).plain()))
    assert plain["steps"][1]["adapt.lora"]["r"] == 32
    assert plain["seed"] == 7
    assert err == "# text/quickstart: 2 steps, 4 tasks; ready to run\n"
    assert list(Path().iterdir()) == []


def test_what_check_writes_can_be_checked_again(llmq):
    out, _ = llmq("check", "text/qlora-nf4")
    Path("again.yaml").write_text(out)
    assert llmq("check", "again.yaml")[0] == out


def test_check_as_data(llmq):
    out, err = llmq("check", "text/quickstart", "--json")
    assert json.loads(out) == yaml.safe_load(llmq("check", "text/quickstart")[0])
    assert err == ""


def test_stopping_by_hand_says_so(monkeypatch, capsys):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load", stopped)
    monkeypatch.setattr(sys, "argv", ["llmq", "run", "text/quickstart"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr() == (
        "",
        "llmq: stopped\n",  # nothing was begun, and so nothing can be resumed
    )


def test_a_job_that_fails_ends_with_code_4(monkeypatch, capsys):
    from llmq.errors import LlmqError

    def failed(*_: object, **__: object) -> None:
        raise LlmqError("two\nlines")

    monkeypatch.setattr(recipe, "load", failed)
    monkeypatch.setattr(sys, "argv", ["llmq", "run", "text/quickstart"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 4
    assert capsys.readouterr() == ("", "llmq: two lines\n")


LIGHT = (["--help"], ["list"], ["show", "adapt.lora"], ["check", "text/quickstart", "model.weights=org/name"])


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_light_commands_do_not_import_torch(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ended_without_torch(words) == 0


@pytest.mark.parametrize("words", [["check", "--data"], ["run"]], ids=" ".join)
def test_bad_data_is_refused_before_torch_is_imported(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "r.yaml").write_text("model: dcgan\nsteps:\n- adapt.train: {data: .}\nevaluate: []\n")
    assert ended_without_torch([*words, "r.yaml"]) == 2


def ended_without_torch(words: list[str]) -> int:
    """The exit code of a command that imports no heavy library, in a process of its own."""
    code = f"""
import sys
from llmq import cli
sys.argv = ["llmq", *{words!r}]
try:
    cli.main()
except SystemExit as stop:
    print(stop.code or 0, sorted({{"torch", "transformers", "peft", "datasets"}} & sys.modules.keys()))
"""
    ended, imported = in_a_process(code).splitlines()[-1].split(maxsplit=1)
    assert imported == "[]"
    return int(ended)


def cpu_seconds(*words: str) -> float:
    """Processor time of Python with these words in a process of its own, the best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "most"), zip(LIGHT, (2.2, 2.2, 2.2, 4.4), strict=True), ids=lambda v: str(v))
def test_light_commands_answer_at_once(words, most, tmp_path, monkeypatch):
    # Beside the imports that each of them needs: a busy processor slows both.
    monkeypatch.chdir(tmp_path)
    needed = cpu_seconds("-c", "import pydantic, typer, yaml; type('A', (pydantic.BaseModel,), {})")
    assert cpu_seconds("-m", "llmq", *words) < most * needed


def test_native_code_that_dies_says_where():
    script = (
        "import signal; from llmq import cli\n"
        "cli.command_line = lambda: lambda *a, **k: signal.raise_signal(11)\n"
        "cli.main()"
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGSEGV
    assert died.stderr.startswith("Fatal Python error: Segmentation fault")


@pytest.mark.parametrize("name", ["text/quickstart", "text-quick", "vision/digits-sparsity"])
def test_show_gives_a_recipe_a_suite_and_a_sweep_as_data(llmq, name):
    assert json.loads(llmq("show", name, "--json")[0]) == yaml.safe_load(llmq("show", name)[0])


def test_copy_answers_with_data(llmq, tmp_path):
    told = json.loads(llmq("copy", "text/quickstart", str(tmp_path / "a b"), "--json")[0])
    assert yaml.safe_load(Path(told["recipe"]).read_text(encoding="utf-8"))["seed"] == 0

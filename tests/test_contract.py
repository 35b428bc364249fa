"""What every plug-in promises. New ones are found by themselves."""

import ast
import inspect
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_socket import SocketBlockedError

import llmq
from llmq import plugin, recipe, words
from llmq.files import cache
from llmq.types import Data, Model, Plugin, Step, Task

ROOT = Path(llmq.__file__).parent
WORDS = plugin.words()
STATES = {"packed", "adapter"}
RUNTIMES = {"torch", "openvino", "gguf", "onnx"}
NOUN_OF = {"models": Model, "data": Data, "quantize": Step, "prune": Step, "adapt": Step, "export": Step, "tasks": Task}
METHODS = {"apply", "base", "open", "read"}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "lm_eval",
    "matplotlib",
    "nncf",
    "onnx",
    "onnxruntime",
    "openvino",
    "pandas",
    "peft",
    "pyarrow",
    "safetensors",
    "sklearn",
    "timm",
    "tokenizers",
    "torch",
    "torch_pruning",
    "torchmetrics",
    "torchvision",
    "transformers",
}


def module_files(word: str) -> list[Path]:
    """The file that defines a word, or those of its folder, the one that defines it first."""
    place = ROOT / Path(*word.split("."))
    return [place / "__init__.py", *place.glob("[!_]*.py")] if place.is_dir() else [place.with_suffix(".py")]


def imports_of(tree: ast.AST) -> set[str]:
    """The full names of the modules, and of what is taken from them, anywhere in a tree."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_tests_reach_no_network_and_nobodys_cache(llmq_cache):
    with pytest.raises(SocketBlockedError):
        socket.create_connection(("127.0.0.1", 9))
    assert cache("x") == llmq_cache / "x"


def test_nothing_but_words_lies_in_a_plug_in_folder():
    for package in words.PACKAGES:
        names = {f.stem for f in (ROOT / package).iterdir() if f.name not in ("__init__.py", "__pycache__")}
        assert {f"{package}.{name}" for name in names} == {w for w in WORDS if w.startswith(f"{package}.")}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_one_plug_in_of_its_packages_noun(word):
    cls = plugin.load(word)
    assert issubclass(cls, NOUN_OF[word.split(".")[0]])
    assert Path(inspect.getfile(cls)) == module_files(word)[0]
    shared = [base for base in cls.__mro__ if issubclass(base, Plugin) and base is not cls]
    shared = [base for base in shared if base.__name__.isidentifier()]  # `Step[LanguageModel]` counts as the word's own
    assert not {base.__module__.removeprefix("llmq.") for base in shared} & set(WORDS), "what words share is no word"


@pytest.mark.parametrize("word", WORDS)
def test_the_documentation_of_a_word_is_that_of_its_file(word):
    first = WORDS[word]
    assert first.endswith(".")
    assert first == (sys.modules[plugin.load(word).__module__].__doc__ or "").split("\n")[0]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_can_do_what_its_noun_promises(word):
    cls = plugin.load(word)
    if issubclass(cls, Task):
        assert any(getattr(cls, name) is not getattr(Task, name) for name in ("score", "against", "clocks"))
        return
    noun = NOUN_OF[word.split(".")[0]]
    for name in METHODS & set(vars(noun)):
        assert getattr(cls, name) is not getattr(noun, name)


@pytest.mark.parametrize("word", [w for w in WORDS if issubclass(plugin.load(w), Step | Task)])
def test_steps_and_tasks_say_which_kinds_they_suit(word):
    suits = plugin.load(word).suits
    kinds = {plugin.load(w).kind for w in WORDS if w.startswith("models.")}
    assert suits
    assert set(suits) & kinds


@pytest.mark.parametrize("word", [w for w in WORDS if w.startswith("models.")])
def test_the_suite_of_a_family_suits_it(word):
    family = plugin.load(word)
    assert recipe.suite_tasks(family.suite, recipe.Source("test", {}), family.kind)


@pytest.mark.parametrize("word", [w for w in WORDS if issubclass(plugin.load(w), Step)])
def test_steps_speak_of_known_states_only(word):
    cls = plugin.load(word)
    leaves = dict(cls.leaves)
    assert {leaves.pop("runtime", "torch"), *cls.runtimes} <= RUNTIMES
    for said in (cls.requires, leaves):
        assert set(said) <= STATES
        assert all(isinstance(value, bool) for value in said.values())


@pytest.mark.parametrize("word", WORDS)
def test_settings_are_strict_and_frozen(word):
    cls = plugin.load(word)
    assert cls.model_config["extra"] == "forbid"
    assert cls.model_config["frozen"]
    assert cls.model_json_schema()["type"] == "object"
    assert not any(name in Plugin.__dict__ for name in cls.model_fields)


@pytest.mark.parametrize("word", WORDS)
def test_plug_ins_never_import_one_another(word):
    others = {f"llmq.{w}" for w in WORDS if w != word}
    for file in module_files(word):
        assert not imports_of(ast.parse(file.read_text())) & others, file


def test_nothing_heavy_is_imported_to_list_check_or_show():
    modules = [f"llmq.{word}" for word in WORDS] + ["llmq.cli", "llmq.plugin", "llmq.recipe", "llmq.pipeline"]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(ended.stdout.split())
    assert "llmq.cli" in ended.stdout.split()


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_documented(file):
    assert ast.get_docstring(ast.parse(file.read_text()))

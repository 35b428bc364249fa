"""A recipe word is a file: one more file is one more word."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmq.quantize
from llmq import plugin, recipe
from llmq.errors import UserError

STEP = '''\
"""Halves the weights.

More about it.
"""

from typing import ClassVar

from llmq.types import Step


class Halve(Step):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    times: int = 1
'''
JOB = "model: {causal_lm: {weights: org/name}}\nsteps:\n- quantize.halve_it: {times: 2}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder whose files are words of `quantize`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llmq.quantize, "__path__", [*llmq.quantize.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("llmq.quantize."):
            del sys.modules[name]
    plugin.load.cache_clear()


def test_one_file_is_one_word(folder):
    (folder / "halve_it.py").write_text(STEP)
    assert plugin.words()["quantize.halve_it"] == "Halves the weights."
    (folder / "job.yaml").write_text(JOB)
    (step,) = recipe.load("job.yaml").steps
    assert (step.word, step.times) == ("quantize.halve_it", 2)


def test_its_settings_are_checked_like_those_of_any_word(folder):
    (folder / "halve_it.py").write_text(STEP)
    (folder / "job.yaml").write_text(JOB.replace("times", "time"))
    with pytest.raises(UserError, match=r"job\.yaml:3: unknown key 'time' of quantize\.halve_it; did you mean 'times'"):
        recipe.load("job.yaml")


def test_a_file_that_appears_later_is_found_and_one_that_goes_is_forgotten(folder):
    assert "quantize.halve_it" not in plugin.words()
    (folder / "halve_it.py").write_text(STEP)
    assert "quantize.halve_it" in plugin.words()
    (folder / "halve_it.py").unlink()
    assert "quantize.halve_it" not in plugin.words()


def test_a_file_that_changes_is_read_again(folder):
    file = folder / "halve_it.py"
    file.write_text(STEP)
    assert plugin.words()["quantize.halve_it"] == "Halves the weights."
    file.write_text(STEP.replace("Halves", "Doubles"))
    os.utime(file, ns=(0, 0))  # the clock of a file system may not tick between two writes
    assert plugin.words()["quantize.halve_it"] == "Doubles the weights."


def test_a_file_that_is_not_python_fails_by_name(folder):
    (folder / "broken.py").write_text('"""Is broken."""\nclass Broken(Step:\n')
    assert plugin.words()["quantize.broken"] == "Is broken."
    with pytest.raises(SyntaxError, match=r"broken\.py"):
        plugin.load("quantize.broken")
    (folder / "broken.py").write_text('"""Has no end.')
    with pytest.raises(SyntaxError, match=r"broken\.py"):
        plugin.words()


def test_the_documentation_may_come_after_comments(folder):
    (folder / "halve_it.py").write_text(f"# Licence.\n\n{STEP}")
    assert plugin.words()["quantize.halve_it"] == "Halves the weights."
    (folder / "halve_it.py").write_text(STEP[STEP.index("from") :])
    os.utime(folder / "halve_it.py", ns=(0, 0))
    assert plugin.words()["quantize.halve_it"] == ""


def test_a_file_that_cannot_be_imported_fails_by_name(folder):
    (folder / "halve_it.py").write_text("import no_such_library\n" + STEP)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        plugin.load("quantize.halve_it")


def test_two_plug_ins_in_a_file_fail_by_name(folder):
    (folder / "halve_it.py").write_text(STEP + "\n\nclass Double(Step):\n    pass\n")
    with pytest.raises(TypeError, match=r"halve_it\.py must define exactly one plug-in class.*Halve.*Double"):
        plugin.load("quantize.halve_it")


def test_a_folder_is_one_word_with_helpers_of_its_own(folder):
    (folder / "halve_it").mkdir()
    (folder / "halve_it" / "__init__.py").write_text(STEP)
    (folder / "halve_it" / "maths.py").write_text("def halve(x):\n    return x / 2\n")
    assert plugin.words()["quantize.halve_it"] == "Halves the weights."
    assert not [word for word in plugin.words() if "maths" in word]
    assert plugin.load("quantize.halve_it").__name__ == "Halve"


def test_a_plain_module_among_the_words_fails_by_name(folder):
    (folder / "maths.py").write_text("def halve(x):\n    return x / 2\n")
    with pytest.raises(TypeError, match=r"maths\.py must define exactly one plug-in class"):
        plugin.load("quantize.maths")


def test_words_are_sorted_and_read_without_importing(folder):
    (folder / "halve_it.py").write_text("raise RuntimeError('imported')\n" + STEP)
    found = list(plugin.words())
    assert "quantize.halve_it" in found
    assert found == sorted(found)


@pytest.mark.parametrize("word", ["quantize", "quantize.", ".bnb", "bnb", "types.Step", "quantize..bnb", "", "cli"])
def test_what_is_no_word_is_refused(word):
    with pytest.raises(UserError, match="unknown word"):
        plugin.load(word)


@pytest.mark.parametrize(
    ("written", "word", "settings"),
    [
        ("pydoc", "data.pydoc", {"held_out": 0.1}),
        ({"pydoc": {"held_out": 0.2}}, "data.pydoc", {"held_out": 0.2}),
        ({"pydoc": None}, "data.pydoc", {"held_out": 0.1}),
        ("a/b.jsonl", "data.file", {"path": Path("a/b.jsonl")}),
        ({"file": {"path": "b.csv", "limit": 3}}, "data.file", {"path": Path("b.csv"), "limit": 3}),
        ("owner/set", "data.hub", {"path": "owner/set", "split": "train"}),
    ],
)
def test_a_field_for_data_takes_a_word_a_path_or_a_hub_id(written, word, settings):
    data = plugin.build({"adapt.lora": {"data": written}}).data
    assert data.word == word
    assert data.model_dump(include=set(settings)) == settings


@pytest.mark.parametrize("written", ["pydoc", {"pydoc": {"held_out": 0.2}}, "b.jsonl", "owner/set"])
def test_what_was_set_survives_being_written_as_plain_data(written):
    lora = plugin.build({"adapt.lora": {"data": written, "target_modules": ["q_proj"], "r": 8}})
    plain = plugin.to_plain(lora)
    assert set(plain) == {"data", "target_modules", "r"}
    assert plugin.build({"adapt.lora": plain}) == lora

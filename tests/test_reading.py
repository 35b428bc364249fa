"""What steps and tasks read: every plug-in among their settings is found, checked, judged and hashed."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from llmq import plugin, reading, recipe
from llmq.errors import UserError
from llmq.source import Source
from llmq.types import Data, Split, Step, Task


class Numbers(Data):
    """Rows that count how often they were checked."""

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    checked: ClassVar[list[str]] = []

    name: str = ""
    inner: Data | None = None

    def check(self) -> None:
        super().check()
        self.checked.append(self.name)

    def read(self) -> Split:
        return Split([1], [2], "text", {}, f"hash of {self.name}")


class Pool(BaseModel):
    """Settings that are no plug-in and hold one."""

    source: Data


class Mix(Task):
    """A task that reads data in every way a field can hold it."""

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    text: Data
    several: tuple[Data, ...] = ()
    named: dict[str, Data] = {}
    pools: list[Pool] = []


def mixed() -> Mix:
    """Five data sets in five kinds of places, one of them within another."""
    return Mix(
        text=Numbers(name="a", inner=Numbers(name="b")),
        several=(Numbers(name="c"),),
        named={"x": Numbers(name="d")},
        pools=[Pool(source=Numbers(name="e"))],
    )


def test_every_plug_in_among_the_settings_is_found_with_its_place():
    assert {at: its.name for at, its in mixed().parts()} == {  # type: ignore[attr-defined]
        ("text",): "a",
        ("text", "inner"): "b",
        ("several", 0): "c",
        ("named", "x"): "d",
        ("pools", 0, "source"): "e",
    }


def test_each_is_checked_once():
    Numbers.checked.clear()
    mixed().check()
    assert sorted(Numbers.checked) == list("abcde")


def test_each_is_hashed():
    assert sorted(reading.hashes([mixed()]).values()) == [f"hash of {name}" for name in "abcde"]


def test_two_data_sets_of_one_word_are_two():
    whole, half = (plugin.build({"pydoc": {"held_out": share}}, "data") for share in (0.1, 0.2))
    tasks = [plugin.build({"perplexity": {"data": data}}, "tasks") for data in (whole, half)]
    assert len(set(reading.hashes(tasks).values())) == len(reading.hashes(tasks)) == 2


READERS = [
    (word, name)
    for word in plugin.words()
    if issubclass(cls := plugin.load(word), Step | Task)
    for name, field in cls.model_fields.items()
    if "data" in name or name == "text"
    if field.annotation is not Path and "BeforeValidator" in repr(field)
]


def test_there_are_words_that_read_data():
    assert {"adapt.lora", "tasks.perplexity", "tasks.divergence", "quantize.int8"} <= {word for word, _ in READERS}


@pytest.mark.parametrize(("word", "field"), READERS)
def test_no_word_forgets_to_check_what_it_reads(word, field):
    needed = {"prune.layers": {"drop": 1}}.get(word, {})
    part = plugin.build({word: {**needed, field: {"file": {"path": "no.jsonl"}}}})
    with pytest.raises(UserError, match=r"there is no file 'no\.jsonl'"):
        part.check()


def load(tmp_path: Path, text: str) -> recipe.Recipe:
    """The recipe in a text."""
    (tmp_path / "r.yaml").write_text(text)
    return recipe.load(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("task", ["divergence: {text: digits}", "perplexity: {data: digits}", "generate: {data: rock}"])
def test_data_of_another_kind_is_refused_whatever_its_field_is_called(tmp_path, task):
    text = f"model:\n  causal_lm: {{weights: org/name}}\nevaluate:\n- size\n- {task}\n"
    with pytest.raises(UserError, match=r"r\.yaml:5: 'data\.\w+' suits .*, and this model is a causal-lm"):
        load(tmp_path, text)


def test_a_key_that_data_lacks_is_named_where_it_stands(tmp_path):
    text = "model: {causal_lm: {weights: org/name}}\nevaluate:\n- divergence:\n    text:\n      file:\n"
    text += "        pth: x.jsonl\n"
    with pytest.raises(UserError, match=r"r\.yaml:6: unknown key 'pth' of data\.file; did you mean 'path'"):
        load(tmp_path, text)


def test_a_key_of_data_within_a_list_is_named_where_it_stands():
    settings = {"several": [{"pydoc": {}}, {"file": {"pth": 1}}]}
    assert recipe._innermost(settings, ("several", 1, "pth")) == (2, ("several", 1, "file"), "file")
    assert recipe._innermost({"data": "pydoc"}, ("data", "pth")) is None
    assert Source("here", {}).where(("several", 1)) == "here"


@pytest.mark.parametrize(
    "data",
    [
        "pydoc",
        "digits",
        "photographs",
        {"scenes": {"train": 1, "held_out": 1}},
        {"rock": {"train_slices": 1, "held_out_slices": 1}},
    ],
    ids=lambda data: next(iter(data)) if isinstance(data, dict) else data,
)
def test_data_has_the_shape_that_it_says_unread(data):
    built = plugin.build(data, "data")
    assert isinstance(built, Data)
    assert built.read().shape in built.shapes

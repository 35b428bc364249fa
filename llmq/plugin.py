"""A recipe word is a file: `quantize.bnb` is the plug-in class in `llmq/quantize/bnb.py`. There is no other list."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, SerializeAsAny, ValidationInfo

from llmq.errors import UserError, did_you_mean
from llmq.types import Plugin

NOUNS = ("Model", "Step", "Task", "Data")
WORD = re.compile(r"^class \w+\([^)]*\b(Model|Step|Task|Data)\b", re.MULTILINE)
"""The head of a class that may be a word."""
PACKAGES = ("models", "data", "quantize", "prune", "adapt", "tasks")


def words() -> dict[str, str]:
    """Every word with the first line of its documentation, read off the files without importing one."""
    return dict(sorted(found for package in PACKAGES for found in _words_of(package)))


def _words_of(package: str) -> Iterator[tuple[str, str]]:
    for folder in importlib.import_module(f"llmq.{package}").__path__:
        for file in Path(folder).glob("*.py"):
            line = _first_line(file, file.stat().st_mtime_ns)
            if line is not None:
                yield f"{package}.{file.stem}", line


@cache
def _first_line(file: Path, changed: int) -> str | None:
    # `changed` is there for the cache: parsing every file at every look-up took half the time of `llmq check`.
    text = file.read_text(encoding="utf-8")
    if not WORD.search(text):  # parsing the helpers that lie beside the words took most of the time
        return None
    for node in ast.parse(text, filename=str(file)).body:
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in NOUNS for b in node.bases):
            return (ast.get_docstring(node) or "").split("\n")[0]
    return None


def load(word: str) -> type[Plugin]:
    """The plug-in class that a word names."""
    known = words()
    if word not in known:
        raise UserError(f"unknown word {word!r}{did_you_mean(word, known)}")
    module = importlib.import_module(f"llmq.{word}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Plugin) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must define exactly one plug-in class, found {[c.__name__ for c in found]}")
    return found[0]


def name_and_settings(value: Any) -> tuple[str, dict[str, Any]]:
    """Split `word`, or `{word: settings}`, into its two parts."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and len(value) == 1:
        ((word, settings),) = value.items()
        if isinstance(word, str) and (settings is None or isinstance(settings, dict)):
            return word, settings or {}
    raise UserError(f"{value!r} is not a word: write 'word' or 'word: {{key: value}}'")


def build(value: Any, package: str | None = None) -> Plugin:
    """The plug-in that `word` or `{word: settings}` describes; `package` is what the place itself already says."""
    if isinstance(value, Plugin):
        return value
    word, settings = name_and_settings(value)
    return load(f"{package}.{word}" if package else word).model_validate(settings)


def data_entry(value: str, kind: str | None = None) -> dict[str, dict[str, Any]]:
    """What a bare word or path stands for, where data is named: `{"file": {"path": "my.jsonl"}}`.

    Which data a path means depends on the kind of the model: a folder is images with classes, or images with boxes.
    """
    if f"data.{value}" in words():
        return {value: {}}
    if value in words():
        raise _said_twice(value)
    for word in (w for w in words() if w.startswith("data.")):
        cls: Any = load(word)
        if (kind or "causal-lm") in cls.suits and cls.takes(value):
            return {word.removeprefix("data."): {"path": value}}
    raise UserError(f"{value!r} is no word of data{did_you_mean(value, _data_words())}")


def _said_twice(word: str) -> UserError:
    """That a word stands whole, `data.pydoc`, where its place says the package already."""
    return UserError(f"unknown word {word!r}{did_you_mean(word, _data_words())}")


def _data_words() -> list[str]:
    return [word.removeprefix("data.") for word in words() if word.startswith("data.")]


def _data(value: Any, info: ValidationInfo) -> Any:
    # A bare path is what most people have: `data: my.jsonl`.
    try:
        if isinstance(value, str):
            value = data_entry(value, (info.context or {}).get("kind"))
        if isinstance(value, dict) and (word := next(iter(value), None)) in words():
            raise _said_twice(str(word))
        return build(value, "data")
    except UserError as error:  # pydantic adds the place to a ValueError
        raise ValueError(str(error)) from None


DataWord = Annotated[SerializeAsAny[Any], BeforeValidator(_data)]
"""A field that holds a `Data` plug-in, written as `pydoc`, `{file: {path: my.jsonl}}` or just `my.jsonl`."""


def to_plain(plugin: Plugin) -> Any:
    """What was set of it, nested words included, as YAML can hold it."""
    return {
        name: _plain_value(getattr(plugin, name))
        for name in type(plugin).model_fields
        if name in plugin.model_fields_set
    }


def entry(plugin: Plugin, *, whole: bool = False) -> Any:
    """A plug-in as it stands in a recipe: its word, the `whole` of it where the place does not say the package."""
    word, settings = plugin.word if whole else plugin.word.split(".", 1)[-1], to_plain(plugin)
    return {word: settings} if settings else word


def _plain_value(value: Any) -> Any:
    if isinstance(value, Plugin):
        return entry(value)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {key: _plain_value(its) for key, its in value.items()}
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

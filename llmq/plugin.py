"""A recipe word is a file: `quantize.bnb` is the plug-in class in `llmq/quantize/bnb.py`. There is no other list.

A word with helpers of its own is a folder: `prune.channels` is the class in `llmq/prune/channels/__init__.py`.
The docstring of the file documents the word.
"""

import importlib
import inspect
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationInfo

from llmq.errors import UserError, did_you_mean
from llmq.types import JsonObject, Model, Plugin
from llmq.words import words as words


@cache
def load(word: str) -> type[Plugin]:
    """The plug-in class that a word names."""
    known = words()
    if word not in known:
        raise UserError(f"unknown word {word!r}{did_you_mean(word, known) or '; llmq list names all'}")
    module = importlib.import_module(f"llmq.{word}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, Plugin)
        and c.__module__ == module.__name__
        and c.__name__.isidentifier()  # pydantic puts a generic base into the module, too: `Step[LanguageModel]`
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must define exactly one plug-in class, found {[c.__name__ for c in found]}")
    return found[0]


class KindsOf(Collection[str]):
    """The kinds of all models whose family is a subclass of one class."""

    def __init__(self, family: type[Model]) -> None:
        self.family = family

    def _loaded(self) -> set[str]:
        families = [self.family]
        for family in families:
            families += family.__subclasses__()
        return {family.kind for family in families if hasattr(family, "kind")}

    def __contains__(self, kind: object) -> bool:
        return kind in self._loaded()  # whoever asks has a model of that kind: its family is loaded

    def __iter__(self) -> Iterator[str]:
        for word in words():
            if word.startswith("models."):
                load(word)
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(list(iter(self)))


def name_and_settings(value: object) -> tuple[str, JsonObject]:
    """Split `word`, or `{word: settings}`, into its two parts."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and len(value) == 1:
        ((word, settings),) = value.items()
        if isinstance(word, str) and (settings is None or isinstance(settings, dict)):
            return word, settings or {}
    raise UserError(f"{value!r} is not a word: write 'word' or 'word: {{key: value}}'")


def build(value: object, package: str | None = None) -> Plugin:
    """The plug-in that `word` or `{word: settings}` describes; `package` is the one that the place implies."""
    if isinstance(value, Plugin):
        return value
    word, settings = name_and_settings(value)
    return load(f"{package}.{word}" if package else word).model_validate(settings)


def data_entry(value: str, kind: str | None = None) -> dict[str, JsonObject]:
    """The data set that a bare word or path stands for: `{"file": {"path": "my.jsonl"}}`.

    The kind of the model decides the data of a path: a folder is images with classes, or images with boxes.
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
    """The error for `data.pydoc` in a place that takes only data, where `pydoc` is right."""
    return UserError(f"unknown word {word!r}{did_you_mean(word, _data_words())}")


def _data_words() -> list[str]:
    return [word.removeprefix("data.") for word in words() if word.startswith("data.")]


def _data(value: object, info: ValidationInfo) -> object:
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


def data_of_run(word: str) -> Any:
    """The field of a task that reads the data of its run, or else `word`."""
    use = "the run's training data, else its calibration data, if unset; without either, this"
    return Field(word, validate_default=True, description=use)


def to_plain(plugin: Plugin) -> Any:
    """The settings that are set explicitly, nested words included, as YAML can hold them."""
    return {
        name: _plain_value(getattr(plugin, name))
        for name in type(plugin).model_fields
        if name in plugin.model_fields_set
    }


def entry(plugin: Plugin, *, whole: bool = False) -> Any:
    """A plug-in as a recipe writes it; with `whole` the word keeps the package."""
    word, settings = plugin.word if whole else plugin.word.split(".", 1)[-1], to_plain(plugin)
    return {word: settings} if settings else word


def _plain_value(value: object) -> object:
    if isinstance(value, Plugin):
        return entry(value)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {key: _plain_value(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

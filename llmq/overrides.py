"""`word.key=value` on the command line, folded into a recipe."""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any

from llmq import plugin
from llmq.errors import UserError, did_you_mean
from llmq.source import Place, Source, to_flow, value_of, with_suite, word_at

Settings = dict[str, Any]
INSTEAD = {"max_steps": "num_train_epochs", "num_train_epochs": "max_steps"}
"""Settings that take the place of another one."""


def in_order(overrides: Mapping[str, object] | Iterable[str]) -> list[str]:
    """Overrides of whole keys (`evaluate=text-quick`) first, then the others; both in the order given.

    A mapping of values by key is written out as YAML has it.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={to_flow(value)}" for key, value in overrides.items()]
    return sorted(overrides, key=lambda override: "." in override.partition("=")[0])


def fold(source: Source, override: str, keys: Collection[str]) -> None:
    """Fold one override into the data of a recipe; `keys` are those that a recipe has."""
    target, equals, text = override.partition("=")
    if not equals or not target:
        raise UserError(f"override {override!r} is not of the form word.key=value")
    try:
        value = value_of(text)
    except UserError as error:
        raise UserError(f"override {override[:200]!r}: {text[:80]!r} is not YAML: {error}") from None
    parent, place, inner = _target(source, target, override, keys)
    for key, following in pairwise(inner):
        parent, place = _into(parent, key, following, place, _kind(source))
        source.lines.setdefault(place, -1)
    parent[inner[-1]] = value
    source.lines[(*place, inner[-1])] = -1
    other = INSTEAD.get(inner[-1], "")
    if value is not None and source.lines.get((*place, other)) != -1:  # unless both were asked for
        parent.pop(other, None)


def _into(parent: Settings, key: str, following: str, place: Place, kind: str | None) -> tuple[Settings, Place]:
    """The settings under a key; for a data set those of the data, with or without the word in the override."""
    current = parent.get(key)
    if isinstance(current, str) and place[:1] != ("model",):
        current = plugin.data_entry(current, kind)
    if not isinstance(current, dict):
        current = {}
    word = next(iter(current)) if len(current) == 1 else ""
    if f"data.{word}" in plugin.words() and following != word:
        if f"data.{following}" not in plugin.words():
            parent[key] = {word: dict(current[word] or {})}
            return parent[key][word], (*place, key, word)
        current = {}  # the override names another data set
    parent[key] = {k: {} if v is None and k == word else v for k, v in current.items()}
    return parent[key], (*place, key)


def _kind(source: Source) -> str | None:
    """The kind of the recipe's model; None for an unknown word."""
    try:
        word, _ = plugin.name_and_settings(source.data.get("model") or "causal_lm")
        return str(getattr(plugin.load(f"models.{word}"), "kind", "")) or None
    except UserError:
        return None


def _target(source: Source, target: str, override: str, keys: Collection[str]) -> tuple[Settings, Place, list[str]]:
    """The settings that an override changes, their place, and the rest of the key."""
    data = source.data
    first, _, rest = target.partition(".")
    if first == "model" and rest:
        word, settings = word_at(source, ("model",), data.get("model") or "causal_lm")
        data["model"] = {word: settings}
        return settings, ("model", word), rest.split(".")
    if first in keys and not rest:
        return data, (), [first]
    steps = _entries(source, "steps", "{number}-{word}")
    found = _one_of(source, "steps", steps, target, override)
    if not found:
        with_suite(source)
        tasks = _entries(source, "evaluate", "{word}-{place}")
        found = _one_of(source, "evaluate", tasks, target.removeprefix("tasks."), override)
    if found:
        return found
    word = target.rpartition(".")[0] or target
    if target in {each for _, each, _ in (*steps, *tasks)} | {"model"}:
        raise UserError(f"override {override!r}: {target} is a word with settings; write {target}.KEY=VALUE")
    known = [*(each for _, each, _ in steps), *(each for _, each, _ in tasks), "model"]
    raise UserError(f"override {override!r}: this recipe has no {word!r}{did_you_mean(word, known)}")


def _entries(source: Source, key: str, form: str) -> list[tuple[str, str, Settings]]:
    """For each step or task the unique name, the word and the settings."""
    entries = source.data.get(key)
    found: list[tuple[str, str, Settings]] = []
    for number, entry in enumerate(entries if isinstance(entries, list) else (), 1):
        word, settings = word_at(source, (key, number - 1), entry)
        place = 1 + sum(word == other for _, other, _ in found)
        found.append((form.format(number=number, word=word, place=place), word, settings))
    return found


def _one_of(
    source: Source, key: str, entries: list[tuple[str, str, Settings]], target: str, override: str
) -> tuple[Settings, Place, list[str]] | None:
    named = [
        (number, word, settings, target.removeprefix(f"{said}.").split("."))
        for number, (name, word, settings) in enumerate(entries)
        for said in (word, name)
        if target.startswith(f"{said}.")
    ]
    if len(named) > 1:
        names, noun = " or ".join(entries[number][0] for number, *_ in named), re.sub("evaluate", "tasks", key)
        raise UserError(f"override {override!r}: this recipe has {len(named)} {noun} {named[0][1]!r}; write {names}")
    for number, word, settings, inner in named:
        source.data[key][number] = {word: settings}
        return settings, (key, number, word), inner
    return None


def with_columns(data: str, columns: str | None) -> Any:
    """A bare word or path of rows of text, with the columns that `prompt=query,completion=reply` names."""
    if columns is None:
        return data
    pairs = [pair.partition("=") for pair in columns.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise UserError(
            f"--columns {columns!r}: write prompt=query,completion=reply, our names before those of the data"
        )
    ((word, settings),) = plugin.data_entry(data, "causal-lm").items()
    return {word: {**settings, "columns": {ours.strip(): theirs.strip() for ours, _, theirs in pairs}}}

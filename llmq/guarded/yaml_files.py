"""YAML out of files that others wrote: plain values and nothing that builds objects, in bounded size."""

from contextlib import suppress
from typing import Any

import yaml

from llmq.errors import UserError

LONGEST = 2**20
"""Characters of a recipe or suite."""
MOST = 20_000
"""Values and keys of a recipe or suite, aliases counted as often as they stand for something."""
DEEPEST = 32
LONGEST_NUMBER = 300
"""Characters; more make no number that a recipe could need."""
PREFIX = "tag:yaml.org,2002:"
NUMBERS = ("int", "float")
TEXTS = ("str", "timestamp", "merge", "value")
"""Scalars that are taken as the text that they are: a recipe has no use for dates."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of the one document in a text; None of an empty one. Raises `UserError` with the line."""
    if len(text) > LONGEST:
        raise UserError(f"{name}: {len(text)} characters; a recipe has {LONGEST} at most")
    try:
        _check_events(text, name)
        return yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{name}{line}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a character that is no character
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())[:200]}") from None


def _check_events(text: str, name: str) -> None:
    """Bound what `compose` would build, before it does."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if depth > DEEPEST:
            raise UserError(f"{where}: nested deeper than any recipe ({DEEPEST})")
        if count > 2 * MOST:
            raise UserError(f"{where}: more than {MOST} values, and no recipe has so many")


def scalar(node: yaml.Node, where: str) -> Any:
    """What a scalar stands for. Raises `UserError` for a tag that is none of the plain ones, or a value that is not."""
    tag = node.tag.removeprefix(PREFIX)
    if tag in TEXTS:
        return node.value
    if tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
        raise UserError(f"{where}: a number of {len(node.value)} characters; {LONGEST_NUMBER} at most")
    if tag in (*NUMBERS, "bool", "null"):
        with suppress(Exception):  # PyYAML's own constructors raise whatever they meet
            return yaml.SafeLoader("").construct_document(node)
    raise UserError(f"{where}: {node.value[:80]!r} cannot be read as {node.tag[:80]!r}")


def key(node: yaml.Node, where: str) -> str:
    """The key that a node stands for."""
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: a key is a word, and not a list or a mapping")
    return str(node.value)


def check_collection(node: yaml.Node, where: str) -> None:
    """Raise `UserError` for a mapping or list with a tag of its own: sets, pairs, objects of a language."""
    if node.tag not in (f"{PREFIX}map", f"{PREFIX}seq"):
        raise UserError(f"{where}: {node.tag[:80]!r} is no plain list or mapping; leave the tag out")

"""Untrusted YAML: plain values of bounded size, and no tags that build objects."""

import re
from contextlib import suppress
from math import isfinite

import yaml

from llmq.errors import UserError

LONGEST = 2**20
"""The most characters of a recipe, a suite or a task file."""
MOST = 20_000
"""The most values and keys of a file; an alias counts at each use."""
DEEPEST = 32
LONGEST_NUMBER = 300
"""The most characters of a number."""
PREFIX = "tag:yaml.org,2002:"
NUMBERS = ("int", "float")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")
"""A number that YAML 1.1 takes for a text, as it has no point or no sign: 1e-4."""
ODD = re.compile(r".*[:_]|[-+]?0\d")
"""Texts that YAML 1.1 alone takes for numbers: 2:4 for two minutes and four seconds, 010 for 8, 1_000."""
TEXTS = ("str", "timestamp", "merge", "value")
"""Scalars that stay text: a recipe has no use for dates."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compose(text: str, name: str) -> yaml.Node | None:
    """The root node of the one document in a text; None for an empty text. Raises `UserError` with the line."""
    if len(text) > LONGEST:
        raise UserError(f"{name}: {len(text)} characters; {LONGEST} at most")
    try:
        _check_events(text, name)
        node = yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{name}{line}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a character that is none
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())[:200]}") from None
    if node:
        _check_aliases(node, name)
    return node


def _check_events(text: str, name: str) -> None:
    """Raise `UserError` for too many or too deeply nested values, before `compose` builds them."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if depth > DEEPEST:
            raise UserError(f"{where}: nested deeper than {DEEPEST}")
        if count > 2 * MOST:
            raise UserError(f"{where}: more than {MOST} values")


def _check_aliases(root: yaml.Node, name: str) -> None:
    """Raise `UserError` for too many or too deeply nested values once each alias is filled in."""
    left, count = [(root, 0)], 1
    while left:
        node, depth = left.pop()
        where = f"{name}:{node.start_mark.line + 1}"
        if depth > DEEPEST:
            raise UserError(f"{where}: nested deeper than {DEEPEST}; does an alias (*) stand inside itself?")
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [value for _, value in parts] if isinstance(node, yaml.MappingNode) else parts
        count += len(inner)
        if count > MOST:
            raise UserError(f"{where}: more than {MOST} values once aliases (*) are filled in")
        left += [(value, depth + 1) for value in inner]


def scalar(node: yaml.Node, where: str) -> object:
    """The value of a scalar. Raises `UserError` for a tag that is not plain, or a value that does not fit the tag.

    Infinity and NaN fit none: no report could hold them at the end of a run.
    """
    tag = node.tag.removeprefix(PREFIX)
    plain = isinstance(node, yaml.ScalarNode) and not node.style
    written = plain and EXPONENT.fullmatch(node.value)
    if (tag in TEXTS and not written) or (tag in NUMBERS and plain and ODD.match(node.value)):
        return node.value
    if tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
        raise UserError(f"{where}: a number of {len(node.value)} characters; {LONGEST_NUMBER} at most")
    if tag in (*NUMBERS, "bool", "null", *TEXTS):
        with suppress(Exception):  # PyYAML's own constructors raise whatever they meet
            value = float(node.value) if written else yaml.SafeLoader("").construct_document(node)
            if not isinstance(value, float) or isfinite(value):
                return value
    kind = "a finite number" if written or tag == "float" else f"{node.tag[:80]!r}"
    raise UserError(f"{where}: {node.value[:80]!r} cannot be read as {kind}")


def key(node: yaml.Node, where: str) -> str:
    """The key of a mapping. Raises `UserError` for a list or a mapping as a key."""
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: a key is a word, and not a list or a mapping")
    return str(node.value)


def check_collection(node: yaml.Node, where: str) -> None:
    """Raise `UserError` for a mapping or list with a tag of its own: sets, pairs, objects of a language."""
    if node.tag not in (f"{PREFIX}map", f"{PREFIX}seq"):
        raise UserError(f"{where}: {node.tag[:80]!r} is no plain list or mapping; leave the tag out")

"""Lists of words, recipes and suites for a terminal."""

import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import UserError, visible
from llmq.source import KINDS, names
from llmq.words import PACKAGES, words

if TYPE_CHECKING:
    from llmq.types import Plugin

NARROW, INDENT = 20, "    "
"""The fewest columns of a text that stands beside its head, and what moves it in where it stands below."""


def everything() -> dict[str, dict[str, str]]:
    """Every word, recipe, sweep and suite, with a line on each."""
    return {"words": words()} | {kind: {name: _what(f) for name, f in names(kind).items()} for kind in KINDS}


def in_full(name: str) -> str:
    """The word or recipe that ends in `name`; `name` itself where it is a full name, a folder, or unknown.

    Raises `UserError` for several.
    """
    known = [full for names in everything().values() for full in names]
    if name in known or Path(name).exists():
        return name
    meant = [full for full in known if full.endswith((f".{name}", f"/{name}"))]
    if len(meant) > 1:
        raise UserError(f"{name!r} may be {' or '.join(meant)}; say which")
    return meant[0] if meant else name


def _what(file: Path) -> str:
    return file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# What:").strip()


def by_kind(found: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same lists, with the words of each folder apart."""
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in (*PACKAGES, *KINDS)}
    for word, line in found["words"].items():
        kinds[word.partition(".")[0]][word] = line
    return {**kinds, **{kind: dict(found[kind]) for kind in KINDS}}


def as_text(found: Mapping[str, Mapping[str, str]]) -> str:
    """The lists, each under a title; on a terminal lines are wrapped by words."""
    lines = []
    width = max((len(name) for entries in found.values() for name in entries), default=0)
    for title, entries in found.items():
        lines += [title, *(wrapped(f"  {name:<{width}} ", told) for name, told in entries.items())]
    return "\n".join(lines)


def wrapped(head: str, text: str) -> str:
    """A head and a text beside it, which on a terminal is wrapped by words under itself; below, on a narrow one."""
    if not sys.stdout.isatty() or not text:  # of an empty text `textwrap` leaves out the head, too
        return f"{head}{text}".rstrip()
    width, under = shutil.get_terminal_size().columns, " " * len(head)
    if text and width < len(head) + NARROW:
        return "\n".join((head.rstrip(), textwrap.fill(text, width, initial_indent=INDENT, subsequent_indent=INDENT)))
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=under).rstrip()


def as_seen(text: str) -> str:
    """The text of a file, unchanged for a pipe; on a terminal no character of the text moves the cursor."""
    return visible(text) if sys.stdout.isatty() else text


def settings_of(word: str, cls: "type[Plugin]") -> str:
    """The documentation of a word, and a line for each of its settings."""
    told = f"{word}: {sys.modules[cls.__module__].__doc__}"
    lines = ["\n\n".join(wrapped("", paragraph) for paragraph in told.split("\n\n"))]
    for name, field in cls.model_fields.items():
        default = "needed" if field.is_required() else f"= {field.default!r}"
        lines.append(wrapped(f"  {name:<30} {default:<16} ", field.description or ""))
    return "\n".join(lines)

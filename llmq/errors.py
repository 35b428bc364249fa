"""Every error that llmq raises on purpose: one line that quotes the input, says where, and what would be right."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmq.harmless import visible

if TYPE_CHECKING:
    from pydantic import BaseModel


class LlmqError(Exception):
    """The job could not be done (exit code 4)."""

    exit_code = 4

    def __str__(self) -> str:
        # A file name that is no UTF-8 has lone surrogates, which no terminal and no JSON takes.
        return visible(super().__str__())


class UserError(LlmqError):
    """The user's input is wrong (exit code 2); nothing was started."""

    exit_code = 2


LONGEST_WORD, LONGEST_LINE = 400, 1200


def brief(text: str) -> str:
    """A text on one line, what cannot be printed made visible, long words and lines cut in their middle.

    Input is quoted, and libraries quote it: it may have no end, and may try to steer the terminal.
    """
    line = " ".join(_cut(word, LONGEST_WORD) for word in visible(text).split())
    return _cut(line, LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]}…{text[-longest // 4 :]}"


def one_line(error: BaseException) -> str:
    """An error in one line; one that llmq did not raise itself is named by its class, and its text is cut."""
    text = brief(str(error))
    if isinstance(error, LlmqError):
        return text
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message: the nearest known word, or all of them when few, or nothing."""
    names = sorted(known)
    if near := difflib.get_close_matches(word, names, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    if names and len(names) <= 12:
        return f"; known: {', '.join(names)}"
    return ""


def explain(errors: Sequence[Mapping[str, Any]], cls: "type[BaseModel] | None") -> str:
    """The pydantic errors of one key as one line: what was written, for which word, and what would be right."""
    first = errors[0]
    # Where alternatives were tried, the second part of each place is pydantic's name of the alternative.
    key = ".".join(str(k) for k in (first["loc"] if len(errors) == 1 else first["loc"][:1]))
    owner = f" of {cls.__module__.removeprefix('llmq.')}" if cls else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{owner}{did_you_mean(key, cls.model_fields if cls else ())}"
    if first["type"] == "missing":
        return f"{key!r}{owner} is needed"
    if first["type"] == "value_error":
        message = str(first["msg"]).removeprefix("Value error, ")
        return f"{key!r}{owner}: {message}" if key else f"{owner.removeprefix(' of ')}: {message}"
    wanted = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in errors)
    return f"{key}: {first['input']!r}{owner} is wrong: {', or '.join(wanted)}"

"""Every error that llmq raises on purpose: one line that quotes the input, says where, and what would be right."""

import difflib
from collections.abc import Iterable


class LlmqError(Exception):
    """The job could not be done (exit code 4)."""

    exit_code = 4


class UserError(LlmqError):
    """The user's input is wrong (exit code 2); nothing was started."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message: the nearest known word, or all of them when few, or nothing."""
    names = sorted(known)
    if near := difflib.get_close_matches(word, names, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    if names and len(names) <= 12:
        return f"; known: {', '.join(names)}"
    return ""

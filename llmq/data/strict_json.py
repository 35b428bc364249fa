"""JSON as the standard has it: what Python's own reader takes besides, or would lose, is an error that says why."""

import json
import re
from typing import Any

LONGEST_NUMBER = 4300
"""Digits; Python converts no longer ones."""


class NotPlain(ValueError):
    """Something that reads as JSON, and would be lost or changed on the way."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise NotPlain(f"the key {shown(twice)} stands twice in one object")
    return made


def _constant(name: str) -> Any:
    raise NotPlain(f"{name} is no JSON; write null, or a number")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise NotPlain(f"a number of {len(digits)} digits; {LONGEST_NUMBER} at most")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends. Raises `JSONDecodeError`, or `NotPlain`."""
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise NotPlain("lists or objects are nested too deep to be read") from None


def skip_blanks(text: str, start: int) -> int:
    """Where the next character stands that JSON does not pass over."""
    return BLANKS.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too


BLANKS = re.compile(r"[ \t\n\r]*")


def shown(value: Any) -> str:
    """A value as JSON for a message, on one line and not too long."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__} that no JSON can hold"
    return text if len(text) <= 80 else f"{text[:77]}..."


def why_not_plain(value: Any) -> str:
    """Why a value cannot stand in a JSON file of UTF-8 text; empty if it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        return f"half a character ({error.object[error.start]!r}, a lone surrogate)"
    except RecursionError:
        return "lists or objects that are nested too deep"
    except (TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""

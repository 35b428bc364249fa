"""Standard JSON only: extensions of Python's parser, and data that the parser would lose, are errors."""

import json
import re

from llmq.errors import first_line

LONGEST_NUMBER = 4300
"""The most digits of a number; Python converts no more."""


class NotPlain(ValueError):
    """The error for data that parses as JSON and would be lost or changed."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(values := dict(pairs)) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise NotPlain(f"the key {shown(twice)} stands twice in one object")
    return values


def _constant(name: str) -> None:
    raise NotPlain(f"{name} is no JSON; write null, or a number")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise NotPlain(f"a number of {len(digits)} digits; {LONGEST_NUMBER} at most")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


def parse(text: str, start: int = 0) -> tuple[object, int]:
    """The value that begins at `start`, and the place after the value. Raises `JSONDecodeError`, or `NotPlain`."""
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise NotPlain("lists or objects are nested too deep to be read") from None


def skip_blanks(text: str, start: int) -> int:
    """The place of the next character that is no white space of JSON."""
    return BLANKS.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too


BLANKS = re.compile(r"[ \t\n\r]*")


def shown(value: object) -> str:
    """A value as JSON for a message, on one line and not too long."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__} that no JSON can hold"
    return text if len(text) <= 80 else f"{text[:77]}..."


def why_not_plain(value: object) -> str:
    """The reason why a value cannot stand in a JSON file of UTF-8 text; empty if it can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        return f"half a character ({error.object[error.start]!r}, a lone surrogate)"
    except RecursionError:
        return "lists or objects that are nested too deep"
    except (TypeError, ValueError) as error:
        return first_line(error)
    return ""

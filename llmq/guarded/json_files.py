"""JSON out of files that others wrote."""

import json
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.guarded.files import TEXT, read_text

DEEPEST = 100
"""Lists and objects within one another. Python's own limit is about 1,000, and what walks the data later has none."""


def parse(text: str, where: str) -> Any:
    """A JSON text. Raises `UserError` with the line for what is none, is too deep, or has a number too long."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}: not JSON: {error.msg.lower()}") from None
    except RecursionError:
        raise UserError(f"{where}: lists or objects are nested too deep to be read") from None
    except ValueError as error:  # more digits than Python converts
        raise UserError(f"{where}: {str(error).split(';')[0].lower()}") from None
    check_depth(data, where)
    return data


def check_depth(data: Any, where: str) -> None:
    """Raise `UserError` for lists and objects that are nested deeper than any file needs."""
    level = [data] if _holds(data) else []
    for _ in range(DEEPEST):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part) if _holds(v)]
        if not level:
            return
    raise UserError(f"{where}: lists or objects are nested deeper than {DEEPEST}")


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def read(path: Path, at_most: int = TEXT) -> Any:
    """The data of a JSON file."""
    return parse(read_text(path, at_most), str(path))


def read_object(path: Path, at_most: int = TEXT) -> dict[str, Any]:
    """The object of a JSON file."""
    data = read(path, at_most)
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return data

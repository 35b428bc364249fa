"""Untrusted files before they are parsed: plain files of bounded length only, and JSON of bounded depth."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import REASONS, LlmqError, UserError, in_bytes, is_of_machine, one_line

if TYPE_CHECKING:
    from llmq.types import JsonObject

LONGEST_TEXT = 256 * 2**20
"""Bytes of the longest text that is parsed at once, such as a report or an annotation file."""
DEEPEST = 100
"""The deepest nesting of lists and objects. Python's own limit is about 1,000, and later code has none."""


def check_plain(path: Path) -> int:
    """The size of a file in bytes. Raises `UserError` for a pipe, a device or a folder: reading one may never end."""
    try:
        about = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:  # a NUL, or a lone surrogate
        raise UserError(f"{str(path)!r} can be no name of a file") from None
    if not stat.S_ISREG(about.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise UserError(f"{str(path)!r} is {kinds.get(stat.S_IFMT(about.st_mode), 'a socket')}, and no file")
    return about.st_size


def check_plain_folder(folder: Path) -> None:
    """Raise `UserError` for a pipe, a device or a socket in a folder that a library is to read."""
    try:
        with os.scandir(folder) as entries:
            odd = [entry.path for entry in entries if not (entry.is_file() or entry.is_dir() or entry.is_symlink())]
    except OSError as error:
        raise unreadable(folder, error) from None
    for path in sorted(odd):
        check_plain(Path(path))


def read_bytes(path: Path, at_most: int = LONGEST_TEXT) -> bytes:
    """A whole file. Raises `UserError` for one that is too long, cannot be read, or is no plain file."""
    size = check_plain(path)
    if size > at_most:
        raise UserError(f"{str(path)!r} has {in_bytes(size)}, and {in_bytes(at_most)} is the most that is read of it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def read_text(path: Path, at_most: int = LONGEST_TEXT) -> str:
    """The text of a UTF-8 file. Raises `UserError` with the line for other bytes."""
    try:
        return read_bytes(path, at_most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text: byte {error.object[error.start]:#x}") from None


def read_json(path: Path, at_most: int = LONGEST_TEXT) -> Any:
    """The data of a JSON file."""
    return parse_json(read_text(path, at_most), str(path))


def read_json_object(path: Path) -> "JsonObject":
    """The object of a JSON file. Raises `UserError` for any other value."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return data


def parse_json(text: str, where: str) -> Any:
    """The data of a JSON text. Raises `UserError` with the line for bad JSON, deep nesting, or a number too long."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}: not JSON: {error.msg.lower()}") from None
    except RecursionError:
        raise UserError(f"{where}: lists or objects are nested too deep to be read") from None
    except ValueError as error:  # more digits than Python converts
        raise UserError(f"{where}: {str(error).split(';')[0].lower()}") from None
    level = [data]
    for _ in range(DEEPEST + 1):
        nested = [part for part in level if isinstance(part, dict | list)]
        if not nested:
            return data
        level = [value for part in nested for value in (part.values() if isinstance(part, dict) else part)]
    raise UserError(f"{where}: lists or objects are nested deeper than {DEEPEST}")


def unreadable(path: Path, error: OSError) -> LlmqError:
    """The error for a file that cannot be read: a `UserError`, or an `LlmqError` if the machine failed."""
    kind = LlmqError if is_of_machine(error) else UserError
    return kind(f"{str(path)!r} cannot be read: {REASONS.get(error.errno or 0, error.strerror or str(error))}")


@contextmanager
def library(place: object, what: str) -> Iterator[None]:
    """Turn any error of a library about a broken file into a `UserError` that names the file.

    Faults of the machine pass through. Panics of libraries in Rust are no `Exception`, and are caught as well.
    """
    try:
        yield
    except (LlmqError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_of_machine(error):
            raise
        raise UserError(f"{str(place)!r} is no whole {what}: {one_line(error)[:200]}") from error

"""Files before they are parsed: plain files only, no longer than what they are read as can be."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmq.errors import LlmqError, UserError, one_line
from llmq.faults import REASONS, in_bytes, is_of_machine

TEXT = 256 * 2**20
"""Bytes; the longest text that is parsed at once, such as a report or an annotation file."""


def check_plain(path: Path) -> int:
    """The bytes of a file. Raises `UserError` for a pipe, a device or a folder: reading one may never end."""
    try:
        about = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:  # a NUL, half a character
        raise UserError(f"{str(path)!r} can be no name of a file") from None
    if not stat.S_ISREG(about.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise UserError(f"{str(path)!r} is {kinds.get(stat.S_IFMT(about.st_mode), 'a socket')}, and no file")
    return about.st_size


def check_plain_folder(folder: Path) -> None:
    """Raise `UserError` for what is neither file nor folder in a folder that a library is to read."""
    try:
        with os.scandir(folder) as entries:
            odd = [entry.path for entry in entries if not (entry.is_file() or entry.is_dir() or entry.is_symlink())]
    except OSError as error:
        raise unreadable(folder, error) from None
    for path in sorted(odd):
        check_plain(Path(path))


def read_bytes(path: Path, at_most: int = TEXT) -> bytes:
    """A whole file. Raises `UserError` for one that is none, is too long, or cannot be read."""
    size = check_plain(path)
    if size > at_most:
        raise UserError(f"{str(path)!r} has {in_bytes(size)}, and {in_bytes(at_most)} is the most that is read of it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def read_text(path: Path, at_most: int = TEXT) -> str:
    """A whole file of UTF-8."""
    try:
        return read_bytes(path, at_most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text: byte {error.object[error.start]:#x}") from None


def unreadable(path: Path, error: OSError) -> LlmqError:
    """The error of a file that the system does not give; of the machine's faults nobody's input is the cause."""
    kind = LlmqError if is_of_machine(error) else UserError
    return kind(f"{str(path)!r} cannot be read: {REASONS.get(error.errno or 0, error.strerror or str(error))}")


@contextmanager
def library(place: object, what: str) -> Iterator[None]:
    """Whatever a library raises of a file becomes a `UserError` that names it; what the machine refuses goes on up.

    Broken files make libraries raise whatever they meet; those in Rust even what is no `Exception`.
    """
    try:
        yield
    except (LlmqError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_of_machine(error):
            raise
        raise UserError(f"{str(place)!r} is no whole {what}: {one_line(error)[:200]}") from error

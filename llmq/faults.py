"""Whatever goes wrong that is not ours, in one line: memory, disk, folders, streams, and what nobody foresaw."""

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from llmq.errors import LlmqError, one_line

FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit on files (ulimit -f)",
}
REASONS = {
    **FULL,
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EIO: "the disk fails (input/output error)",
    errno.ENOENT: "it is not there, or its folder vanished",
    errno.ENOTDIR: "a part of this path is no folder",
    errno.ESTALE: "its network drive was taken away",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EPIPE: "what reads the output was closed before all was written",
}
"""What the system's errors mean to a person."""
MACHINE = frozenset(FULL) | {errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
"""Errors that tell of the machine, whatever file is named with them."""
MEMORY = re.compile(
    r"can't allocate memory|bad[_ ]alloc|out of memory|cannot allocate memory|failed to map segment|"
    r"unable to allocate|malloc of size|mmap.{0,40}failed|not enough memory|can't start new thread",
    re.IGNORECASE,
)
"""torch, numpy, Arrow, C++ and the loader of libraries, where they are given no memory."""
ASKED = re.compile(r"(?:allocate|malloc of size)\s+([\d.]+)\s*([KMGT]i?B|bytes)?", re.IGNORECASE)
OF_RUST = re.compile(r"\(os error (\d+)\)")
"""safetensors and tokenizers tell the system's error so."""
WRITING = "while writing "
CUT_SHORT = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs")
"""torch, where a file could not be written whole."""


def in_bytes(count: float) -> str:
    """A number of bytes as a person reads it: `1.2 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine failed, and not what was read."""
    return any(_is_memory(e) or _number(e) in MACHINE or CUT_SHORT.search(str(e)) for e in _chain(error))


def line_of(error: BaseException) -> str:
    """Any error as one line that says what was needed where that can be known."""
    for each in _chain(error):
        if isinstance(each, LlmqError):
            return one_line(each)
        if _is_memory(each):
            return _memory(each)
        if _number(each) is not None or CUT_SHORT.search(str(each)):
            return _system(each)
    return f"unforeseen: {one_line(error)}{_place(error)}"


def is_stream(error: BaseException) -> bool:
    """Whether nobody reads what is printed, which needs no traceback."""
    return _number(error) == errno.EPIPE


def exit_code(error: BaseException) -> int:
    """4, or 2 where the name that was given can be no name of a file."""
    known = next((e for e in _chain(error) if isinstance(e, LlmqError)), None)
    if known is not None:
        return known.exit_code
    return 2 if _number(error) == errno.ENAMETOOLONG else 4


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, LlmqError):
        return False
    return isinstance(error, MemoryError) or _number(error) == errno.ENOMEM or bool(MEMORY.search(str(error)[:2000]))


def _number(error: BaseException) -> int | None:
    """The system's number of an error, as Python or a library of Rust tells it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = OF_RUST.search(str(error)) if not isinstance(error, LlmqError) else None
    return int(told[1]) if told else None


def _memory(error: BaseException) -> str:
    asked = ASKED.search(str(error))
    much = ""
    if asked:
        size = {"K": 1, "M": 2, "G": 3, "T": 4}.get((asked[2] or "b")[0].upper(), 0)
        much = f": {in_bytes(float(asked[1].rstrip('.')) * 1024**size)} were asked for at once"
    return f"not enough memory{much} ({_memory_there()}); take a smaller model, batch or window, or allow more"


def _memory_there() -> str:
    """What limits the memory of this process."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        return f"ulimit -v allows {in_bytes(limit)}"
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return "the machine has no more"
    return f"{in_bytes(free)} are free now"


def _system(error: BaseException) -> str:
    number = _number(error)
    # A write names no file, nor do PyTorch and Rust; then the run says where it writes.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None) or _noted(error)
    reason = REASONS.get(number or errno.ENOSPC, os.strerror(number) if number else "")
    if number == errno.EPIPE:
        return reason
    what = f"{_shown(name)!r}: " if isinstance(name, str | bytes | Path) else ""
    there = _free(name) if number in (*FULL, None) else None
    free = "" if there is None else f" ({in_bytes(there)} are free)"
    if number is None:
        return f"{what}a file could not be written whole{free}; is the disk full?"
    return f"{what}{reason}{free}"


def _shown(name: str | bytes | Path) -> str:
    text = os.fsdecode(name)
    return text if len(text) <= 200 else f"{text[:90]}…{text[-90:]}"


def _free(name: object) -> int | None:
    """The bytes that are free where a file was to be written, where that is known."""
    try:
        return free_bytes(Path(os.fsdecode(name))) if isinstance(name, str | bytes | Path) else None
    except OSError:
        return None


def note_folder(error: BaseException, folder: Path) -> None:
    """Note on an error the folder that was being written, for the line that tells of it."""
    for each in _chain(error):
        each.add_note(f"{WRITING}{folder}")


def _noted(error: BaseException) -> str | None:
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(WRITING) for note in notes if note.startswith(WRITING)), None)


def free_bytes(path: Path) -> int:
    """The bytes that are free where `path` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _place(error: BaseException) -> str:
    """Where in llmq an error came up, for a report of it."""
    root = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(root)]
    return f" (llmq/{Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno})" if frames else ""

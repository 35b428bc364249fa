"""Errors: those that llmq raises on purpose, and the one line that tells of any error.

The line quotes the input, names the place and the cure. Lines about memory and disks also say how much
was asked for or is free, where that is known.
"""

import difflib
import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Controls but the tab and the line break, marks that turn the direction of text, characters without width, lone
surrogates. The joiners of Persian, Hindi and emoji (U+200C, U+200D) belong to the text.
"""
LONGEST_WORD, LONGEST_LINE = 400, 1200

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
    errno.EPIPE: "the reader of the output closed it before all was written",
}
"""The system's errors in plain words."""
MACHINE = frozenset(FULL) | {errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
"""Errors that tell of the machine, whatever file is named with them."""
MEMORY = re.compile(
    r"can't allocate memory|bad[_ ]alloc|out of memory|cannot allocate memory|failed to map segment|"
    r"unable to allocate|malloc of size|mmap.{0,40}failed|not enough memory|can't start new thread",
    re.IGNORECASE,
)
"""Messages of torch, numpy, Arrow, C++ and the dynamic linker when memory is refused."""
BYTES_ASKED = re.compile(r"(?:allocate|malloc of size)\s+([\d.]+)\s*([KMGT]i?B|bytes)?", re.IGNORECASE)
ON_CARD = re.compile(r"(?:CUDA|HIP) out of memory(?:.*?of which ([\d.]+ \w+) is free)?", re.DOTALL)
"""PyTorch's message when a card has no more memory."""
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""The system's error in a message of safetensors or tokenizers."""
CUT_SHORT = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs")
"""Messages of torch when a file could not be written whole."""
WRITING = "while writing "


def visible(text: str) -> str:
    """Text whose unseen characters are spelled: `\\x1b` for an escape."""
    return UNSEEN.sub(lambda character: character[0].encode("unicode_escape").decode(), text)


class LlmqError(Exception):
    """The job could not be done (exit code 4)."""

    exit_code = 4

    def __str__(self) -> str:
        # A file name that is no UTF-8 has lone surrogates, which no terminal and no JSON takes.
        return visible(super().__str__())


class Answered(LlmqError):
    """A part of the job failed (exit code 4), and the command has printed the rest, which names the part."""


class UserError(LlmqError):
    """The user's input is wrong (exit code 2); nothing was started."""

    exit_code = 2


def brief(text: str) -> str:
    """A text on one line, unseen characters spelled, long words and lines cut in their middle.

    Messages quote input, which may have no end, and may try to steer the terminal.
    """
    line = " ".join(_cut(word, LONGEST_WORD) for word in visible(text).split())
    return _cut(line, LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]}…{text[-longest // 4 :]}"


def one_line(error: BaseException) -> str:
    """An error in one line; an error that is not llmq's own begins with its class, and the text is cut."""
    text = brief(str(error))
    if isinstance(error, LlmqError):
        return text
    if _is_memory(error) and ON_CARD.search(str(error)):
        return _memory_line(error)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the class of the error; the members of a set are sorted."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A set is written in another order in every process.
    return re.sub(r"\{('[^{}:]*')\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", lines[0])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of a message: the nearest known word, or all of them when few, or nothing."""
    names = sorted(known)
    if near := difflib.get_close_matches(word, names, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


LISTS = {"tuple_type": "input should be a list: [a, b]", "list_type": "input should be a list: [a, b]"}
"""What pydantic says of Python's kinds, in the words of a recipe, by the type of the error."""


def explain(errors: "Sequence[ErrorDetails]", cls: "type[BaseModel] | None") -> str:
    """The pydantic errors of one key as one line: the value, the word that owns the key, and the cure."""
    first = errors[0]
    # Where alternatives were tried, the second part of each place is pydantic's name of the alternative.
    key = ".".join(str(k) for k in (first["loc"] if len(errors) == 1 else first["loc"][:1]))
    owner = f" of {cls.__module__.removeprefix('llmq.')}" if cls else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{owner}{did_you_mean(key, cls.model_fields if cls else ())}"
    if first["type"] == "missing":
        return f"{key!r}{owner} is needed"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key!r}{owner}: {message}" if key else f"{owner.removeprefix(' of ')}: {message}"
    told = (LISTS.get(e["type"], e["msg"]) for e in errors)
    wanted = dict.fromkeys(text[0].lower() + text[1:] for text in told)
    return f"{key}: {first['input']!r}{owner} is wrong: {', or '.join(wanted)}"


def line_of(error: BaseException) -> str:
    """Any error as one line; a cause in llmq or in the machine goes before the error itself."""
    for each in _chain(error):
        if isinstance(each, LlmqError):
            return one_line(each)
        if _is_memory(each):
            return _memory_line(each)
        if _number(each) is not None or CUT_SHORT.search(str(each)):
            return _system_line(each)
    return f"unforeseen: {one_line(error)}{_place(error)}"


def exit_code(error: BaseException) -> int:
    """The exit code of an error: 2 for wrong input, such as a file name that is too long, else 4."""
    ours = next((e for e in _chain(error) if isinstance(e, LlmqError)), None)
    if ours is not None:
        return ours.exit_code
    return 2 if _number(error) == errno.ENAMETOOLONG else 4


def is_of_machine(error: BaseException) -> bool:
    """True where the machine failed, and the file that was read is not to blame."""
    return any(_is_memory(e) or _number(e) in MACHINE or CUT_SHORT.search(str(e)) for e in _chain(error))


def is_stream(error: BaseException) -> bool:
    """True where the reader of the output is gone, which needs no traceback."""
    return _number(error) == errno.EPIPE


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then the chain of causes."""
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
    """The system's number of an error that Python or a library of Rust raised."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    rust = RUST_ERROR.search(str(error)) if not isinstance(error, LlmqError) else None
    return int(rust[1]) if rust else None


def _memory_line(error: BaseException) -> str:
    asked, size = BYTES_ASKED.search(str(error)), ""
    if asked:
        power = {"K": 1, "M": 2, "G": 3, "T": 4}.get((asked[2] or "b")[0].upper(), 0)
        size = f": {in_bytes(float(asked[1].rstrip('.')) * 1024**power)} were asked for at once"
    card = ON_CARD.search(str(error))
    limit = f"the card has {card[1] or 'no more'} free" if card else _memory_limit()
    return f"not enough memory{size} ({limit}); take a smaller model, batch or window, or allow more"


def _memory_limit() -> str:
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


def _system_line(error: BaseException) -> str:
    number = _number(error)
    if number == errno.EPIPE:
        return REASONS[number]
    # Errors of a write name no file, nor do those of PyTorch and Rust; the run has noted its folder on them.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None) or noted(error, WRITING)
    path = Path(os.fsdecode(name)) if name and isinstance(name, str | bytes | Path) else None
    shown = f"{_cut(str(path), 200)!r}: " if path else ""
    free = _free_line(path) if path and number in (*FULL, None) else ""
    if number is None:
        return f"{shown}a file could not be written whole{free}; is the disk full?"
    return f"{shown}{REASONS.get(number) or os.strerror(number)}{free}"


def _free_line(path: Path) -> str:
    try:
        return f" ({in_bytes(free_bytes(path))} are free)"
    except OSError:
        return ""


def _place(error: BaseException) -> str:
    """The line of llmq where an error was raised, for a bug report; empty if there is none."""
    root = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(root)]
    return f" (llmq/{Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno})" if frames else ""


def note_folder(error: BaseException, folder: Path) -> None:
    """Note the folder that was being written on an error and on all causes of the error."""
    for each in _chain(error):
        each.add_note(f"{WRITING}{folder}")


def noted(error: BaseException, opening: str) -> str:
    """The text after `opening` in the first note that begins with it; empty if there is none."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(opening) for note in notes if note.startswith(opening)), "")


def in_bytes(count: float) -> str:
    """A number of bytes in the largest fitting unit: `1.2 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def free_bytes(path: Path) -> int:
    """The free bytes of the disk that holds, or will hold, `path`."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free

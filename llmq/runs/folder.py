"""The folder of a run: one process at a time writes there."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmq import partials, stopping
from llmq.errors import UserError
from llmq.terminal import say

LOCK = ".lock"
"""The file that a process locks while it writes in the folder; it holds the process id and the start time."""
_held: set[int] = set()


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which the system frees when the process dies.

    A new folder that stays empty is removed. Raises `UserError` where another process holds it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    _held.add(lock)

    def leave() -> None:
        (out / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # stops at the first folder that is not empty
            for folder in made:
                folder.rmdir()

    stopping.at_end.append(leave)
    try:
        partials.sweep(out)
        yield
    finally:
        leave()
        stopping.at_end.remove(leave)
        _held.discard(lock)
        os.close(lock)


def fresh(out: str | os.PathLike[str] | None, name: str) -> Path:
    """`out`, or the first of runs/name, runs/name-2, … that does not exist. Raises `UserError` for a file."""
    if out:
        return no_file(named(Path(out)))
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def named(path: Path) -> Path:
    """The path itself; the whole path of `.` or `..`, which have no neighbours by name."""
    return path if path.name not in ("", "..") else path.resolve()


def no_file(path: Path) -> Path:
    """The path itself. Raises `UserError` for a file where a folder is meant."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{str(path)!r} is a file; name a folder")
    return path


def holds(out: Path) -> list[str]:
    """The names in a folder, without the lock and the partials of a run that was killed early."""
    names = [f.name for f in out.iterdir()] if out.is_dir() else []
    return [name for name in names if name != LOCK and not partials.NAME.fullmatch(name)]


def _lock(out: Path) -> int:
    while True:
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                say(f"{out} cannot be locked ({error.strerror}); see that no second run writes there")
                return lock
            holder = _holder(lock)
            os.close(lock)
            raise UserError(
                f"{str(out)!r} is in use by {holder}; wait until that run has ended, or use a new --out"
            ) from None
        with suppress(FileNotFoundError):  # the run before removed it between the opening and the locking
            if os.path.samestat(os.fstat(lock), (out / LOCK).stat()):
                os.ftruncate(lock, 0)
                about = {"process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.pwrite(lock, json.dumps(about).encode(), 0)
                return lock
        os.close(lock)


def _holder(lock: int) -> str:
    """The process that holds a lock and the start time, if the file holds both."""
    try:
        about = json.loads(os.pread(lock, 1000, 0))
        return f"process {int(about['process'])} since {str(about['since'])[:19]}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _let_go() -> None:
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)  # a worker that outlives the run for a moment must not hold its folder

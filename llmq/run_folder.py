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
"""Locked while a process writes in the folder; it says which, and since when."""
_held: set[int] = set()


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which death frees too. A folder in which nothing was written goes again.

    Raises `UserError` where another process holds it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    _held.add(lock)

    def leave() -> None:
        (out / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # the first that holds something
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


def holds(out: Path) -> list[str]:
    """The names of what lies in a folder, without what a run killed before it wrote anything whole left there."""
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
            told = _told(lock)
            os.close(lock)
            raise UserError(
                f"{str(out)!r} is in use{told}; wait until that run has ended, or use a new --out"
            ) from None
        if _is_at(lock, out / LOCK):
            os.ftruncate(lock, 0)
            told = json.dumps({"process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
            os.pwrite(lock, told.encode(), 0)
            return lock
        os.close(lock)  # the run before removed it between the opening and the locking


def _told(lock: int) -> str:
    """Who holds a lock, as its file says; empty where it does not."""
    try:
        told = json.loads(os.pread(lock, 1000, 0))
        return f" by process {int(told['process'])} since {str(told['since'])[:19]}"
    except (ValueError, KeyError, TypeError):
        return " by another process"


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)  # a worker that outlives the run for a moment must not hold its folder

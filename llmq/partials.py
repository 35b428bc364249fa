"""Files and folders that are written under another name and renamed when whole; leftovers of dead writers are swept.

A writer locks the partial (`flock`), and the death of the writer frees the lock. No process id is compared: that of a
dead writer may belong to another process by now, or to another machine that shares the folder.
"""

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

NAME = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
"""The partial folder of a stage has no such number: a resumed run goes on inside it, and no sweep removes it."""


@contextmanager
def partial_of(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target`, under a name that no other writer has; it replaces `target` at the end.

    An error removes the partial. A `folder` that exists already stays.
    """
    _sweep_once(target.parent)
    partial, lock = _create(target, folder)
    try:
        yield partial
        try:
            partial.replace(target)
        except OSError:
            if not (folder and target.is_dir()):
                raise
    finally:
        _remove(partial)
        os.close(lock)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder of the system's. The next process sweeps a folder that a kill has left."""
    place = Path(tempfile.gettempdir())
    _sweep_once(place)
    folder, lock = _create(place / "llmq", folder=True)
    folder.chmod(0o700)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def sweep(folder: Path) -> None:
    """Remove the partials of dead writers from a folder."""
    for partial in folder.iterdir() if folder.is_dir() else ():
        if NAME.fullmatch(partial.name):
            with suppress(OSError):  # renamed by now, still being written, or owned by another user
                lock = os.open(partial, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(partial)
                finally:
                    os.close(lock)


@cache
def _sweep_once(folder: Path) -> None:
    with suppress(OSError):
        sweep(folder)


def _create(target: Path, folder: bool) -> tuple[Path, int]:
    while True:
        partial = target.with_name(f".{target.name[:60]}.{secrets.token_hex(8)}.partial")
        if folder:
            partial.mkdir(parents=True)
        else:
            partial.touch(exist_ok=False)
        with suppress(FileNotFoundError):  # swept before it was locked
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # a sweeper holds it; or a file system has no locks, where nothing is swept either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():
                return partial, lock
            os.close(lock)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)

"""What is written under a name of its own and renamed when whole; and what dead writers left is swept.

A writer locks what it writes (`flock`), and its death frees the lock. No process id is compared: that of a dead writer
may belong to somebody else by now, or to another machine that shares the folder.
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
"""The partial of a stage has no such number in its name: resuming goes on inside it, and nobody sweeps it."""


@contextmanager
def partial_of(target: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target`, under a name that no other writer has; it takes the place of `target`.

    What is written when an error comes is removed. Where a `folder` is there already, that one stays.
    """
    _sweep_once(target.parent)
    partial, lock = _create(target, folder)
    try:
        yield partial
        if folder:
            _rename_unless_there(partial, target)
        else:
            partial.replace(target)
    finally:
        _remove(partial)
        os.close(lock)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, among those of the system. What a kill leaves there, the next process sweeps."""
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
    """Remove what dead writers left in a folder."""
    for partial in folder.iterdir() if folder.is_dir() else ():
        if NAME.fullmatch(partial.name):
            with suppress(OSError):  # it is renamed by now, still written, or somebody else's
                lock = os.open(partial, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(partial)
                finally:
                    os.close(lock)


def sweep_all(folder: Path) -> None:
    """Remove what dead writers left in a folder and in the folders within it."""
    for inside in (folder, *(f for f in folder.rglob("*") if f.is_dir())):
        sweep(inside)


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


def _rename_unless_there(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)

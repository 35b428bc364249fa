"""Checkpoints of a training: each a folder, whole once a manifest of the hashes of its files lies in it.

The manifest is written last and in one step. A checkpoint without one was cut short by a kill; one whose files are not
what the manifest says was damaged later. Either is said, and the newest whole one before it is taken.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmq.files import sha256, write_json
from llmq.terminal import say

MANIFEST = "manifest.json"
KEPT = 2
"""Checkpoints that are kept: a damaged one costs the steps since the one before, and not the training."""


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Make a checkpoint whole: write the hash of each of its files."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_json(checkpoint / MANIFEST, dict(_hashes(checkpoint)))


def drop_old(folder: Path, kept: int = KEPT, also: Iterable[Path] = ()) -> None:
    """Remove all but the newest checkpoints, and those that are wanted `also`."""
    for checkpoint in _newest_first(folder)[kept:]:
        if checkpoint.resolve() not in {each.resolve() for each in also}:
            shutil.rmtree(checkpoint)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. Says which newer ones are not, and why."""
    for checkpoint in _newest_first(folder):
        if not (damage := damage_of(checkpoint)):
            return checkpoint
        say(f"  {checkpoint.name} is passed over: {damage}")
    return None


def last_sealed(folder: Path) -> Path | None:
    """The newest checkpoint that was whole when it was written; its files are not read again."""
    return next((c for c in _newest_first(folder) if (c / MANIFEST).is_file()), None)


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        told = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, RecursionError):
        return f"{MANIFEST} is no manifest"
    if not isinstance(told, dict):
        return f"{MANIFEST} is no manifest"
    try:
        found = dict(_hashes(checkpoint))
    except OSError as error:
        return f"{error.filename} cannot be read"
    if lost := sorted(told.keys() - found.keys()):
        return f"{lost[0]} is missing"
    changed = sorted(name for name in told if told[name] != found[name])
    return f"{changed[0]} is damaged" if changed else ""


def _newest_first(folder: Path) -> list[Path]:
    found = [c for c in folder.glob("checkpoint-*") if c.is_dir() and c.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _hashes(checkpoint: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            yield file.relative_to(checkpoint).as_posix(), sha256(file)

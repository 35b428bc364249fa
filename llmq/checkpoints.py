"""Checkpoints of a training: folders, each whole once it holds a manifest with the hashes of its files.

The manifest is written last and in one step. A checkpoint without one was cut short by a kill; one whose files differ
from the manifest was damaged later. Both are reported, and training resumes from the newest whole one.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmq.files import sha256, write_json
from llmq.terminal import say

MANIFEST = "manifest.json"
KEPT = 2
"""Checkpoints to keep: if the newest is damaged, training resumes from the one before."""


def place(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return folder / f"checkpoint-{step}"


def seal(checkpoint: Path) -> None:
    """Write the manifest, which makes a checkpoint whole."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_json(checkpoint / MANIFEST, dict(_hashes(checkpoint)))


def drop_old(folder: Path, kept: int = KEPT, also: Iterable[Path] = ()) -> None:
    """Remove all checkpoints but the newest `kept` and those in `also`."""
    for checkpoint in _newest_first(folder)[kept:]:
        if checkpoint.resolve() not in {each.resolve() for each in also}:
            shutil.rmtree(checkpoint)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; newer ones that are damaged are reported with the reason."""
    for checkpoint in _newest_first(folder):
        if not (damage := damage_of(checkpoint)):
            return checkpoint
        say(f"  {checkpoint.name} is passed over: {damage}")
    return None


def last_sealed(folder: Path) -> Path | None:
    """The newest checkpoint with a manifest, or None; the hashes are not checked again."""
    return next((c for c in _newest_first(folder) if (c / MANIFEST).is_file()), None)


def damage_of(checkpoint: Path) -> str:
    """The damage of a checkpoint, in words; empty if it is whole."""
    try:
        told = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return f"{MANIFEST} is no manifest"
    try:
        hashes = dict(_hashes(checkpoint))
    except OSError as error:
        return f"{error.filename} cannot be read"
    if lost := sorted(told.keys() - hashes.keys()):
        return f"{lost[0]} is missing"
    changed = sorted(name for name in told if told[name] != hashes[name])
    return f"{changed[0]} is damaged" if changed else ""


def _newest_first(folder: Path) -> list[Path]:
    steps = {c: c.name.rpartition("-")[2] for c in folder.glob("checkpoint-*") if c.is_dir()}
    return sorted((c for c, step in steps.items() if step.isdecimal()), key=lambda c: int(steps[c]), reverse=True)


def _hashes(checkpoint: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            yield file.relative_to(checkpoint).as_posix(), sha256(file)

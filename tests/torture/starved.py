"""Runs short of memory or of open files, in a process that never learns what they import: imports fail as well."""

from pathlib import Path

from torture import child, faults


def warm() -> None:
    """Import what all commands need, and no more from then on."""
    child.warm()
    child.learns = False


def once(seed: int, folder: Path) -> str:
    """One such run, and the same again with nothing wrong."""
    return faults.bear(faults.STARVING[seed % len(faults.STARVING)], seed, folder)

"""What lies in folders of data: links are followed, what systems leave there is no data, and both are counted."""

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

NO_DATA = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"})
"""Folders and files that systems leave, in lower case; with them everything whose name begins with a dot."""


@dataclass
class Found:
    """The files of the wanted suffixes under a folder, and how many others were left out, and why."""

    images: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_no_data(path: Path) -> bool:
    """Whether a system or a tool left it there: `.DS_Store`, `.ipynb_checkpoints`, `@eaDir`, `Thumbs.db`, …"""
    return path.name.startswith(".") or path.name.lower() in NO_DATA


def under(folder: Path, suffixes: Collection[str], above: Collection[str] = ()) -> Found:
    """All such files under a folder, links followed, in the order of their paths.

    A link that leads nowhere, or to a folder that it lies in, is left out. `above` are the folders that are being read.
    """
    real = Path(os.path.realpath(folder))
    found, here = Found(), {*(above or map(str, real.parents)), str(real)}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            found.left_out["broken_links"] += 1
        elif is_no_data(path):
            found.left_out["system_files"] += sum(len(files) for *_, files in os.walk(path)) if path.is_dir() else 1
        elif path.is_dir() and os.path.realpath(path) in here:
            found.left_out["circular_links"] += 1
        elif path.is_dir():
            inner = under(path, suffixes, here)
            found.images += inner.images
            found.left_out += inner.left_out
        elif path.suffix.lower() in suffixes and path.is_file():
            found.images.append(path)
        else:
            found.left_out["no_image"] += 1
    return found

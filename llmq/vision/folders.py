"""Image files in folders of data. Links are followed; files that are no data are left out and counted."""

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

NO_DATA = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"})
"""Folders and files that operating systems leave, in lower case; names that begin with a dot are no data either."""


@dataclass
class Files:
    """The images under a folder, and the number of other files for each reason to leave them out."""

    images: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_no_data(path: Path) -> bool:
    """True for a file that a system or a tool left: `.DS_Store`, `.ipynb_checkpoints`, `@eaDir`, `Thumbs.db`, …"""
    return path.name.startswith(".") or path.name.lower() in NO_DATA


def under(folder: Path, suffixes: Collection[str], above: Collection[str] = ()) -> Files:
    """All files of these suffixes under a folder, in the order of their paths.

    A link that leads nowhere, or to a folder around the link, is left out. `above` are the real paths of the folders
    that are being read.
    """
    real = Path(os.path.realpath(folder))
    files, here = Files(), {*(above or map(str, real.parents)), str(real)}  # a link to these leads round in circles
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():  # exists() follows the link
            files.left_out["broken_links"] += 1
        elif is_no_data(path):
            files.left_out["system_files"] += sum(len(names) for *_, names in os.walk(path)) if path.is_dir() else 1
        elif path.is_dir() and os.path.realpath(path) in here:
            files.left_out["circular_links"] += 1
        elif path.is_dir():
            inner = under(path, suffixes, here)
            files.images += inner.images
            files.left_out += inner.left_out
        elif path.suffix.lower() in suffixes and path.is_file():  # .JPG is as good as .jpg
            files.images.append(path)
        else:
            files.left_out["no_image"] += 1
    return files

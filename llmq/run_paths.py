"""Paths that stand in a run folder, which somebody else may have written: each is resolved inside the run."""

import os
import stat
from pathlib import Path

from llmq.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def within(folder: Path, name: object, said_by: Path | str) -> Path:
    """The path that `name` has in a folder. Raises `UserError` if it leads out of it, links followed."""
    home = folder.resolve()
    try:
        path = (home / str(name)).resolve()
        inside = isinstance(name, str) and path.is_relative_to(home)
    except (OSError, ValueError, RuntimeError):  # a null character, a ring of links, a name that is too long
        inside = False
    if not inside:
        raise UserError(f"{str(said_by)!r} names {name!r}, which does not lie inside {str(folder)!r}")
    return path


def check(run: Path) -> None:
    """Raise `UserError` for a link in a run folder that leads out of it, and for what is neither file nor folder.

    A log, an answer or a picture behind such a link would be read, or written, elsewhere.
    """
    home = run.resolve()
    for folder, folders, files in os.walk(home):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode):
                _check_link(entry, home)
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{str(entry)!r} is neither a file nor a folder; a run holds nothing else")


def _check_link(link: Path, home: Path) -> None:
    try:
        inside = link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # links in a ring
        inside = False
    if not inside:
        raise UserError(f"{str(link)!r} is a link to {os.readlink(link)!r}, which lies outside of {str(home)!r}")


def picture(run: Path, name: str) -> bytes:
    """The bytes of a picture of a run. Raises `UserError` unless it is a PNG inside the run."""
    file = within(run, name, run)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"the picture {str(file)!r} cannot be read: {error.strerror}") from None
    if not data.startswith(PNG):
        raise UserError(f"{str(file)!r} is no PNG, as pictures of a run are")
    return data

"""Paths in a run folder, which may be untrusted: each must resolve inside the run."""

import os
import stat
from pathlib import Path

from llmq.errors import UserError
from llmq.types import SCHEMA_VERSION

PNG = b"\x89PNG\r\n\x1a\n"


def within(folder: Path, name: object, said_by: Path | str) -> Path:
    """The resolved path of `name` in a folder. Raises `UserError` for a path out of the folder, links followed."""
    if not isinstance(name, str) or not _is_inside(folder / name, folder):
        raise UserError(f"{str(said_by)!r} names {name!r}, which does not lie inside {str(folder)!r}")
    return (folder / name).resolve()


def check(run: Path) -> None:
    """Raise `UserError` for a link that leads out of a run folder, and for pipes, devices and sockets.

    A log, an answer or a picture behind such a link would be read, or written, elsewhere.
    """
    home = run.resolve()
    for folder, folders, files in os.walk(home):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode) and not _is_inside(entry, home):
                raise UserError(
                    f"{str(entry)!r} is a link to {os.readlink(entry)!r}, which lies outside of {str(home)!r}"
                )
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{str(entry)!r} is neither a file nor a folder; a run holds nothing else")


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null character, a ring of links, a name that is too long
        return False


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


def check_schema(report: object, file: Path) -> None:
    """Raise `UserError` for a `report.json` of another schema: its entries may mean something else."""
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version is not None and (type(version) is not int or version > SCHEMA_VERSION):
        raise UserError(
            f"{str(file)!r} has schema version {version!r:.20}; this llmq knows {SCHEMA_VERSION}: take a later one"
        )

"""The hash of every file of a run, written when the run ends."""

from pathlib import Path

from llmq.errors import UserError
from llmq.files import CARD, sha256, write_json
from llmq.guarded.files import read_json_object
from llmq.runs.folder import LOCK

FILE = "hashes.json"
UNHASHED = (FILE, "log.txt", LOCK, "tensorboard")
"""Files that change after the run has ended, or that would have to hash themselves."""


def record(run: Path) -> None:
    """Write the hash of every file of a run into it."""
    write_json(run / FILE, {"files": hashes(run)})


def hashes(run: Path) -> dict[str, str]:
    """The hash of every file of a run."""
    files = (f for f in run.rglob("*") if f.is_file() and f.name != CARD)
    found = sorted(f for f in files if f.relative_to(run).parts[0] not in UNHASHED)
    return {f.relative_to(run).as_posix(): sha256(f) for f in found}


def recorded(run: Path) -> dict[str, str]:
    """The hashes that a run wrote when it ended. Raises `UserError` for a folder that has none."""
    file = run / FILE
    if not file.is_file():
        hint = "it did not end, or is older than hashes" if (run / "recipe.yaml").is_file() else "it is no run of llmq"
        raise UserError(f"{str(run)!r} has no {FILE}: {hint}")
    try:
        found = read_json_object(file)["files"]
        return {str(name): str(value) for name, value in found.items()}
    except (UserError, KeyError, AttributeError):
        raise UserError(f"{str(file)!r} holds no hashes of llmq") from None

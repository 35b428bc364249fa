"""The hash of every file of a run, written when the run ends, and of the files of its base, written when it begins."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from llmq.artifact import MACHINE, Artifact
from llmq.errors import UserError
from llmq.files import CARD, sha256, write_json
from llmq.guarded.files import read_json_object
from llmq.runs.folder import LOCK

FILE = "hashes.json"
UNHASHED = (FILE, "log.txt", LOCK, "tensorboard")
"""Files that change after the run has ended, or that would have to hash themselves."""
SAYING = (
    "config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json", "tokenizer*",
    "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.py",
)  # fmt: skip
"""The files of configuration, tokenizer, template and code beside weights."""


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


def is_opened(name: str) -> bool:
    """True for a file of a stage that would be opened with the model beside it."""
    return "/" in name and any(fnmatch(Path(name).name, pattern) for pattern in (*SAYING, "*.safetensors*"))


def of_base(base: Artifact) -> dict[str, dict[str, object]]:
    """Size, time and hash of each file that a base is opened from, by name."""
    return {f.name: {"size": f.stat().st_size, "time": _time(f), "sha256": sha256(f)} for f in _files(base)}


def check_base(base: Artifact, stage: Path) -> None:
    """Raise `UserError` for a base whose files are others than when the run in which it is a stage began.

    A file of the same size and time is taken for the same; any other is hashed.
    """
    if name := other_file(base, stage, _is_same):
        raise UserError(
            f"{str(stage)!r} began from another {name} than lies in {str(base.weights)!r} now; bring back what "
            "was there, or use a new --out"
        )


def other_file(base: Artifact, stage: Path, same: Callable[[Path, Mapping[str, object]], bool]) -> str:
    """The first file of a base that is not the `same` as when the run began, that came or went; or nothing."""
    kept = read_json_object(stage / MACHINE).get("files") if (stage / MACHINE).is_file() else None
    if not isinstance(kept, dict):  # of an older run
        return ""
    files = {f.name: f for f in _files(base)}
    changed = (
        n for n in sorted(kept.keys() | files.keys()) if not (n in files and n in kept and same(files[n], kept[n]))
    )
    return next(changed, "")


def _files(base: Artifact) -> list[Path]:
    """The files of the weights, and all beside them that say how to open and ask the model."""
    beside = (f for name in SAYING for f in base.weights.glob(name))  # none of a file
    adapter = {base.adapter / "adapter_config.json"} if base.adapter else set()
    return sorted({*base.weight_files(), *adapter, *(f for f in beside if f.is_file())})


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns


def _is_same(file: Path, kept: Mapping[str, object]) -> bool:
    if file.stat().st_size != kept.get("size"):
        return False
    return _time(file) == kept.get("time") or sha256(file) == kept.get("sha256")

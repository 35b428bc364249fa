"""Files and folders that are written whole or not at all, hashes, and the cache."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path

from llmq import partials
from llmq.errors import UNSEEN, LlmqError, UserError, free_bytes, in_bytes


def cache(*parts: str) -> Path:
    """A place under the cache folder (`LLMQ_CACHE`, or `llmq` in the user's cache folder)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmq"
    return Path(os.environ.get("LLMQ_CACHE", default)).joinpath(*parts)


def make_whole(folder: Path, fill: Callable[[Path], None], shared: bool = False) -> Path:
    """Make `folder` by `fill`ing a sibling and renaming the sibling, so that a killed process leaves no half folder.

    The next call goes on filling an unfinished sibling. If several processes share the folder (`shared`), each fills a
    sibling of its own, and the first to finish wins.
    """
    if shared and not folder.exists():
        with partials.partial_of(folder, folder=True) as partial:
            fill(partial)
    elif not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for inside in (partial, *(f for f in partial.rglob("*") if f.is_dir())):
            partials.sweep(inside)
        fill(partial)
        partial.rename(folder)
    return folder


def at_home(path: str | Path) -> Path:
    """A path with `~` and `~name` filled in. Raises `UserError` for a user that this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{str(path)!r}: this machine knows no home folder of that user; write the path out") from None


def check_space(place: Path, needed: int, what: str) -> None:
    """Raise `LlmqError` if the disk of `place` has fewer free bytes than `needed`."""
    free = free_bytes(place)
    if free < needed:
        raise LlmqError(
            f"{what} needs about {in_bytes(needed)} in {str(place.parent)!r}, and {in_bytes(free)} are free there; "
            "make room, or write elsewhere"
        )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step."""
    with partials.partial_of(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(data: object, indent: int | None = None) -> str:
    """`data` as JSON that every reader takes. Raises `LlmqError` naming the first number that is not finite."""
    try:
        return in_json(json.dumps(data, allow_nan=False, ensure_ascii=indent is None, indent=indent, default=str))
    except ValueError:
        for where, value in _numbers(data):
            if not isfinite(value):
                raise LlmqError(f"{where} is {value}, and JSON knows finite numbers only") from None
        raise


def in_json(text: str) -> str:
    """The same JSON with unseen characters escaped."""
    return UNSEEN.sub(lambda character: "".join(f"\\u{unit:04x}" for unit in _units(character[0])), text)


def _units(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]


def _numbers(data: object, where: str = "") -> Iterator[tuple[str, float]]:
    """The floats in nested data, each with the place: `measurements.3.value`."""
    if isinstance(data, float):
        yield where, data
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in parts:
        yield from _numbers(value, f"{where}.{key}".lstrip("."))


def tagged(config: object) -> object:
    """A model's configuration with infinite numbers as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(config, float) and not isfinite(config):
        return {"__float__": json.dumps(config)}
    if isinstance(config, dict):
        return {key: tagged(value) for key, value in config.items()}
    return [tagged(value) for value in config] if isinstance(config, list | tuple) else config


def write_json(path: Path, data: object) -> None:
    """Write JSON in one step. Raises `LlmqError` naming the first number that is not finite."""
    try:
        text = to_json(data, indent=1)
    except LlmqError as error:
        raise LlmqError(f"{path}: {error}") from None
    write_text(path, text + "\n")


def bundled(kind: str) -> Path:
    """The folder of `recipes`, `sweeps` or `evals`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def portable_path(path: Path, folder: Path) -> str:
    """`path` relative to `folder` if both lie in one run, so that a run can be moved; else absolute."""
    path, run = path.resolve(), folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(run) else str(path)


CARD = "README.md"
"""The model card of a stage, which people edit."""
LAYERS = "layers.json"
"""The facts about each layer that a step changed: bits, error, share of zeros, share of channels taken out."""
BESIDE = (
    LAYERS,
    "artifact.json",
    "machine.json",
    "measurements.json",
    "clocks.json",
    "samples",
    "pictures",
    "lm_eval",
    CARD,
)
"""Files and folders that llmq writes beside a model, and that are no part of the model."""


def bytes_of(files: Iterable[Path]) -> int:
    """The size of files, in bytes."""
    return sum(f.stat().st_size for f in files)


def sha256_text(*texts: str) -> str:
    """One hash over texts in their order; each length is hashed, too, so that borders count."""
    return sha256_texts(texts)


def sha256_texts(texts: Iterable[str]) -> str:
    """The hash of `sha256_text` over an iterable, which need not fit into memory."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def sha256_files(files: Iterable[Path]) -> str:
    """One hash over the names and contents of files, whatever their order."""
    return sha256_text(*sorted(f"{file.name} {sha256(file)}" for file in files))


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

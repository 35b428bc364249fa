"""Folders that are whole or not there, hashes, and the cache."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import Any

from llmq import partials
from llmq.errors import LlmqError, UserError
from llmq.faults import free_bytes, in_bytes
from llmq.guarded import json_files, safetensors_files
from llmq.harmless import in_json


def cache(*parts: str) -> Path:
    """A place under the cache folder (`LLMQ_CACHE`, or `llmq` in the user's cache folder)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmq"
    return Path(os.environ.get("LLMQ_CACHE", default)).joinpath(*parts)


def make_whole(folder: Path, fill: Callable[[Path], None], shared: bool = False) -> Path:
    """Make `folder` by `fill`ing a sibling and renaming it, so that a killed process leaves no half folder.

    What `fill` left unfinished is there again the next time; not so where the folder is `shared` by several processes,
    each of which fills its own, and the first to finish wins.
    """
    if shared and not folder.exists():
        with partials.partial_of(folder, folder=True) as partial:
            fill(partial)
    elif not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        partials.sweep_all(partial)
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
    """Raise `LlmqError` if fewer bytes are free where `place` is to be than are needed."""
    free = free_bytes(place)
    if free < needed:
        raise LlmqError(
            f"{what} needs about {in_bytes(needed)} in {str(place.parent)!r}, and {in_bytes(free)} are free there; "
            "make room, or write elsewhere"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    with partials.partial_of(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(data: Any, **how: Any) -> str:
    """`data` as JSON that every reader takes. Raises `LlmqError` naming the first number that is not finite."""
    try:
        return in_json(json.dumps(data, allow_nan=False, **{"default": str, **how}))
    except ValueError:
        found = _not_finite(data)
        if not found:
            raise
        where, value = found
        raise LlmqError(f"{where} is {value}, and JSON knows finite numbers only") from None


def _not_finite(data: Any, where: str = "") -> tuple[str, float] | None:
    """The first number in nested data that is not finite, with its place: `measurements.3.value`."""
    if isinstance(data, float):
        return None if isfinite(data) else (where, data)
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    found = (_not_finite(value, f"{where}.{key}".lstrip(".")) for key, value in parts)
    return next(filter(None, found), None)


def tagged(config: Any) -> Any:
    """A model's configuration with its infinite numbers as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(config, float) and not isfinite(config):
        return {"__float__": json.dumps(config)}
    if isinstance(config, dict):
        return {key: tagged(value) for key, value in config.items()}
    return [tagged(value) for value in config] if isinstance(config, list | tuple) else config


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step. Raises `LlmqError` naming the first number that is not finite."""
    try:
        text = to_json(data, indent=1, ensure_ascii=False)
    except LlmqError as error:
        raise LlmqError(f"{path}: {error}") from None
    write_text(path, text + "\n")


def bundled(kind: str) -> Path:
    """The folder of `recipes` or `evals`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def portable_path(path: Path, folder: Path) -> str:
    """`path` relative to `folder` if both lie in one run, so that a run can be moved; else absolute."""
    path, run = path.resolve(), folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(run) else str(path)


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a model in one file, or the list of the files that hold them."""
OTHER_NAME = "transformers_weights"
"""The key of `config.json` under which a folder names another file or index than those two."""


def entry_of(folder: Path) -> Path | None:
    """The file where transformers begins: the one that `config.json` names, the single file, or the index; or None.

    Raises `UserError` for a `transformers_weights` that transformers does not take, or that is not there.
    """
    config = folder / "config.json"
    name = json_files.read_object(config).get(OTHER_NAME) if config.is_file() else None
    if name is None:
        return next((folder / known for known in (SINGLE, INDEX) if (folder / known).exists()), None)
    where = f"{str(config)!r}: {OTHER_NAME} {name!r}"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{where} is no *.safetensors and no *.safetensors.index.json")
    if not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
        raise UserError(f"{where} lies outside the folder; name a file in it")
    if not (folder / name).is_file():
        raise UserError(f"{where} is not there; take the key away, and {SINGLE} or {INDEX} is opened")
    return folder / name


def safetensors_of(folder: Path) -> list[Path]:
    """The files that hold a model's weights: what transformers opens (`entry_of`), or all where it would open none.

    A repository may hold the same weights twice, as `consolidated.safetensors` too; what is opened is what counts.
    """
    entry = entry_of(folder)
    if entry and entry.suffix == ".safetensors":
        return [entry]
    try:
        shards = set(json_files.read(entry)["weight_map"].values()) if entry else set()
        named = [folder / name for name in sorted(shards)]
    except (UserError, TypeError, KeyError, AttributeError):
        raise UserError(f"{str(entry)!r} is no index of weights; copy it again, or remove it") from None
    if odd := [name for name in sorted(shards) if Path(name).name != name]:
        raise UserError(f"{str(entry)!r} names {odd[0]!r}; the files of weights lie beside it")
    return named or sorted(folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: an exported graph and its constants, or safetensors."""
    graph = folder / "model.xml"
    return [graph, graph.with_suffix(".bin")] if graph.exists() else safetensors_of(folder)


BESIDE = (
    "artifact.json",
    "measurements.json",
    "clocks.json",
    "samples",
    "pictures",
    "lm_eval",
)  # fmt: skip
"""Files and folders that llmq writes beside a model: they tell of it, and are no part of it."""

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKED = {"U8": "uint8", "I8": "int8", "I32": "int32", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2"}
"""safetensors' names of dtypes. `FLOATS` are weights as they stand; all others (integers, complex, floats of 8 bits and
fewer) are none without scales beside them."""
GRAPHS = {"f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "u8": "U8", "i8": "I8", "i32": "I32"}
"""OpenVINO's names of dtypes, in safetensors' words."""
CONSTANT = re.compile(r'type="Const"[^>]*>\s*<data element_type="(\w+)"[^>]*\bsize="(\d+)"')


def stored_as(files: Iterable[Path]) -> str:
    """The dtype that most weights of safetensors files or of a graph are stored in; packed ones with that of the rest.

    Such as `float32`, or `uint8 and bfloat16`. Empty where no file tells.
    """
    held: Counter[str] = Counter()
    for file in files:
        if file.suffix == ".xml" and file.is_file():
            for dtype, size in CONSTANT.findall(file.read_text(encoding="utf-8")):
                held[GRAPHS.get(dtype, dtype.upper())] += int(size)
        if file.suffix == ".safetensors" and file.is_file():
            for tensor in safetensors_files.header(file).values():
                held[tensor.dtype] += tensor.end - tensor.begin
    dtypes = [dtype for dtype, _ in held.most_common()]
    main = [PACKED.get(dtypes[0], dtypes[0])] if dtypes and dtypes[0] not in FLOATS else []
    return " and ".join(main + [FLOATS[dtype] for dtype in dtypes if dtype in FLOATS][:1])


def bytes_of(files: Iterable[Path]) -> int:
    """The size of files, in bytes."""
    return sum(f.stat().st_size for f in files)


def sha256_text(*texts: str) -> str:
    """One hash over texts, in order, with their borders."""
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
    """The hash of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

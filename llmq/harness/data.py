"""lm-eval's tasks with their data: from a folder of copies, the local hub cache or the hub.

All data is read and hashed before a model is opened; one line names missing data.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import StrictUndefined, UndefinedError

from llmq import trust
from llmq.environment import library_version
from llmq.errors import LlmqError, UserError, first_line, one_line
from llmq.files import sha256_files, sha256_text
from llmq.guarded.templates import BoundedEnvironment
from llmq.harness import sources
from llmq.harness.names import Asked, is_carried

if TYPE_CHECKING:
    from types import ModuleType

    from datasets import DatasetDict
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SCORING = ("evaluate", "math-verify", "nltk", "rouge-score", "sacrebleu", "scikit-learn", "sympy")
"""Libraries that metrics of tasks compute with, beside those that every figure depends on."""
SEED = 1234
"""lm-eval's seed for the choice of a task's examples."""
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLITS |= {"val": "validation", "dev": "dev", "test": "test"}
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})")


@contextmanager
def patched(owner: ModuleType, **names: object) -> Iterator[None]:
    """Replace attributes of a module inside the block."""
    stock = {name: getattr(owner, name) for name in names}
    vars(owner).update(names)
    try:
        yield
    finally:
        vars(owner).update(stock)


@contextmanager
def at_work(asked: Asked) -> Iterator[None]:
    """Run lm-eval: silent without a terminal, and with code and unbounded templates of a folder only if trusted.

    `Asked.check_code` refuses such code earlier; this covers task files that lm-eval finds in another way.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when `datasets` is imported
    import lm_eval.utils
    from lm_eval.tasks import _yaml_loader as loader

    for name in ("lm_eval", "huggingface_hub", "datasets"):  # errors say in one line what these tell at length
        logging.getLogger(name).setLevel(logging.CRITICAL)
    stock = loader._import_func_in_yml

    def load(name: str, folder: Path) -> object:
        if not is_carried(folder):
            trust.need_remote_code(f"the tasks in {str(folder)!r} call {name!r}, which is code that the folder brings")
        return stock(name, folder)

    bounded = {"env": _templates()} if asked.include_path and not trust.remote_code() else {}
    silent = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with silent, patched(loader, _import_func_in_yml=load), patched(lm_eval.utils, **bounded):
        yield


@cache
def _templates() -> BoundedEnvironment:
    """lm-eval's template environment, sandboxed from Python and with bounds."""
    from lm_eval.utils import regex_replace

    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = regex_replace
    return environment


@cache
def manager(asked: Asked) -> TaskManager:
    """lm-eval's index of the folders that the names lie in; an index of all folders takes 20 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(f) for f in asked.folders()], include_defaults=False)


@cache
def built(asked: Asked) -> tuple[Task | Group, ...]:
    """lm-eval's tasks and groups of these names with their data, built once in a process.

    Raises `UserError` for a copy without a column that a task reads, `LlmqError` for a data set that cannot be found.
    """
    made: list[Task | Group] = []
    sources.watch()
    with at_work(asked), _copies_first(asked):
        for name in asked.tasks:
            try:
                loaded = manager(asked).load([name])
            except ImportError as error:
                raise UserError(f"lm_eval {name}: it needs {error.name!r}, which is not installed") from None
            except (KeyError, UndefinedError) as error:
                data = list(dict.fromkeys(repr(d.data) for d in replace(asked, tasks=(name,)).leaves() if d.data))
                shown = ", ".join(data[:3]) + (f" and {len(data) - 3} more" if len(data) > 3 else "")
                raise UserError(f"lm_eval {name}: the data of {shown} lacks an entry of the task: {error}") from None
            made += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return tuple(made)


@contextmanager
def _copies_first(asked: Asked) -> Iterator[None]:
    """Let `datasets.load_dataset` look into the folder of copies first, and report missing data in one line."""
    import datasets

    stock = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: object) -> DatasetDict:
        copy = asked.data_dir / path if asked.data_dir else None
        if copy and copy.is_dir():
            return _copy(copy, name, stock)
        try:
            return stock(path, name, **settings)
        except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors are kinds of OSError
            raise LlmqError(_missing(path, name, asked, error)) from error

    with patched(datasets, load_dataset=load):
        yield


def _missing(path: str, name: str | None, asked: Asked, error: Exception) -> str:
    shown = f"{path} ({name})" if name else path
    tasks = [t for t in asked.tasks if any(d.data == shown for d in replace(asked, tasks=(t,)).leaves())]
    users = ", ".join(tasks or asked.tasks)
    cure = f"there is no folder {str(asked.data_dir / path)!r}" if asked.data_dir else "data_dir can name copies of it"
    said = first_line(error)
    return (
        f"lm_eval {users}: the data set {shown!r} is not on this machine and the hub does not give it ({said}); {cure}"
    )


def _copy(folder: Path, name: str | None, load: Callable[..., DatasetDict]) -> DatasetDict:
    """The splits in a folder: `train.jsonl`, `main/test-00000-of-00001.parquet`, … ; `name` may be a folder within."""
    from datasets.exceptions import DatasetsError

    root = folder / name if name and (folder / name).is_dir() else folder
    files = sorted(f for f in root.rglob("*") if f.suffix in KINDS and f.is_file())
    if name and root == folder and files and not any(f.parent in (root, root / "data") for f in files):
        raise UserError(f"data_dir: there is no folder {str(folder / name)!r}, and those beside it are other data")
    if not files:
        raise UserError(f"data_dir: {str(root)!r} holds no .parquet, .json or .jsonl")
    kinds = {KINDS[f.suffix] for f in files}
    if len(kinds) > 1:
        raise UserError(f"data_dir: {str(root)!r} holds both parquet and JSON; keep one")
    try:
        return load(kinds.pop(), data_files=_splits(files))
    except (OSError, ValueError, DatasetsError) as error:
        first = first_line(error.__cause__ or error)
        raise UserError(f"data_dir: {str(root)!r} cannot be read: {first}") from None


def _splits(files: Sequence[Path]) -> dict[str, list[str]]:
    """The files of each split: one, or all parts of one. Raises `UserError` for a missing part, or several of a split.

    `test.jsonl`, `gsm8k-test.jsonl` and `test-00000-of-00001.parquet` hold the split `test`.
    """
    parts: dict[Path, list[Path]] = {}
    for file in files:
        shard = SHARD.fullmatch(file.stem)
        parts.setdefault(file.with_name(shard["split"] if shard else file.stem), []).append(file)
    splits: dict[str, Path] = {}
    for place, held in parts.items():
        shard = SHARD.fullmatch(held[-1].stem)
        count = int(shard["count"]) if shard else 0
        wanted = [f"{place.name}-{i:05}-of-{count:05}" for i in range(count)] or [place.name]
        have = [file.stem for file in held]
        if lost := sorted({*wanted} - {*have}):
            raise UserError(
                f"data_dir: {str(place.parent)!r} lacks {lost[0]}{held[0].suffix}, a part of {place.name!r}"
            )
        words = re.split("[-_.]", place.name)
        split = next((SPLITS[word] for word in words if word in SPLITS), place.name)
        if split in splits or have != wanted:
            other = splits.get(split, place)
            raise UserError(f"data_dir: {str(other)!r} and {str(place)!r} both hold {split!r}; keep one of them there")
        splits[split] = place
    return {split: list(map(str, parts[place])) for split, place in splits.items()}


def depends(asked: Asked, limit: int | None) -> Mapping[str, str]:
    """The hash of each single task, and that of the user code loaded so far: answers depend on both."""
    asked.check_code()
    functions = [v for task in _single(asked) for v in task.config.to_dict().values() if callable(v)]
    return {**hashes(asked, limit), "code": sources.sha256(functions)}


@cache
def hashes(asked: Asked, limit: int | None = None) -> Mapping[str, str]:
    """One hash for each single task: settings, files, all data, and the questions as built."""
    import lm_eval

    # A checkout of lm-eval may compute metrics and filters otherwise under one version.
    places = [*asked.folders(), *(Path(lm_eval.__file__).parent / name for name in ("api", "filters"))]
    code = sha256_text(
        *(f"{name} {library_version(name)}" for name in SCORING),
        *(sha256_files([f]) for place in places for f in sorted(place.rglob("*")) if _is_code(f)),
    )
    return {task.config.task: sha256_text(code, _hash(task, asked, limit)) for task in _single(asked)}


def _is_code(file: Path) -> bool:
    return file.is_file() and file.suffix in ("", ".py", ".yaml", ".yml", ".txt", ".json", ".jsonl")


def _single(asked: Asked) -> Iterator[Task]:
    for item in built(asked):
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _hash(task: Task, asked: Asked, limit: int | None) -> str:
    """The hash of a task's settings, rows, requests and targets.

    Requests are built as `simple_evaluate` builds them, but for a chat template.
    """
    total = hashlib.sha256()

    def add(data: object) -> None:
        total.update(json.dumps(data, sort_keys=True, default=_named).encode())

    add(task.dump_config())
    for split in sorted(task.dataset, key=str):
        add(str(split))
        rows = task.dataset[split]
        for batch in rows.with_format("arrow").iter(10_000) if hasattr(rows, "with_format") else ():
            add(batch.to_pydict())
        if not hasattr(rows, "with_format"):
            add(list(rows))
    shots = task.get_config("num_fewshot")
    if shots != 0:
        task.set_config(key="num_fewshot", value=shots or 0 if asked.num_fewshot is None else asked.num_fewshot)
    task.set_fewshot_seed(seed=SEED)
    try:
        with at_work(asked):
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            for each in task.instances:
                add((each.request_type, each.doc_id, each.arguments, task.doc_to_target(each.doc)))
    except Exception as error:  # noqa: BLE001 - the task will fail when it is asked, and say so then
        add(one_line(error))
    return total.hexdigest()


def _named(value: object) -> str:
    """The name of a function, whose address differs from run to run."""
    return getattr(value, "__qualname__", None) or f"{type(value).__name__} {value}"

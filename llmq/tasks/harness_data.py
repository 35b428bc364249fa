"""lm-eval's tasks with their data: from a folder of copies, the local hub cache or the hub; one line says what lacks.

Everything is brought before a model is opened, and hashed by what it holds.
"""

import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, UndefinedError

from llmq import trust
from llmq.environment import library_version
from llmq.errors import LlmqError, UserError, one_line
from llmq.files import sha256_files, sha256_text
from llmq.tasks import harness, harness_sources
from llmq.tasks.harness import Asked
from llmq.templates import BoundedEnvironment

SCORING = ("evaluate", "math-verify", "nltk", "rouge-score", "sacrebleu", "scikit-learn", "sympy")
"""What metrics of tasks compute with, beside what every figure depends on."""
SEED = 1234
"""That from which lm-eval draws a task's examples."""
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@cache
def manager(asked: Asked) -> Any:
    """lm-eval's index of the folders that the names lie in; that of all its folders takes 20 seconds."""
    from lm_eval.tasks import TaskManager

    quiet()
    return TaskManager(include_path=[str(f) for f in _places(asked)], include_defaults=False)


@cache
def built(asked: Asked) -> tuple[Any, ...]:
    """lm-eval's tasks and groups of these names, their data read; once in a process.

    Raises `UserError` for a copy that lacks what a task reads, `LlmqError` naming the data set that cannot be had.
    """
    made: list[Any] = []
    quiet()
    harness_sources.watch()
    with silent(), _copies_first(asked), code_of_folders(asked):
        for name in asked.tasks:
            try:
                made += _top(manager(asked).load([name]), name)
            except ImportError as error:
                raise UserError(f"lm_eval {name}: it needs {error.name!r}, which is not installed") from None
            except (KeyError, UndefinedError) as error:
                raise UserError(
                    f"lm_eval {name}: the data of {_needs(name, asked)} lacks what the task reads: {error}"
                ) from None
    return tuple(made)


def _top(loaded: Any, name: str) -> list[Any]:
    """The group of that name, or the tasks that it stands for."""
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def name_of(item: Any) -> str:
    """The name of a task or group of lm-eval."""
    return str(item.config.task if hasattr(item, "config") and hasattr(item.config, "task") else item.name)


def _needs(name: str, asked: Asked) -> str:
    """What a name needs, in words: `'openai/gsm8k (main)'`."""
    data = dict.fromkeys(d.data for d in harness.leaves([name], asked.include_path) if d.data)
    shown = [repr(d) for d in data][:3]
    return ", ".join(shown) + (f" and {len(data) - 3} more" if len(data) > 3 else "")


@contextmanager
def _copies_first(asked: Asked) -> Iterator[None]:
    """Let `datasets.load_dataset` look into the folder of copies first, and say in one line what it cannot get."""
    import datasets

    stock = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        copy = asked.data_dir / path if asked.data_dir else None
        if copy and copy.is_dir():
            return _copy(copy, name, stock)
        try:
            return stock(path, name, **settings)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # the hub's own errors and refused connections are kinds of OSError
            raise LlmqError(_missing(path, name, asked, error)) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = stock


@contextmanager
def code_of_folders(asked: Asked) -> Iterator[None]:
    """Let lm-eval call functions of a person's folder, and render its templates freely, only where that is trusted.

    `harness.check_plain` says so before anything is read. lm-eval looks tasks up in its own way: this is where it does.
    """
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader as loader

    stock, templates = loader._import_func_in_yml, utils.env

    def load(name: str, folder: Path) -> Any:
        if not harness.is_carried(folder):
            trust.need_remote_code(f"the tasks in {str(folder)!r} call {name!r}, which is code that the folder brings")
        return stock(name, folder)

    loader._import_func_in_yml = load
    if asked.include_path and not trust.remote_code():
        utils.env = _sandbox(utils.regex_replace)
    try:
        yield
    finally:
        loader._import_func_in_yml, utils.env = stock, templates


@cache
def _sandbox(regex_replace: Any) -> Any:
    """lm-eval's environment of templates, out of which nothing of Python can be reached, and with bounds."""
    sandbox = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = regex_replace
    return sandbox


def _missing(path: str, name: str | None, asked: Asked, error: Exception) -> str:
    shown = f"{path} ({name})" if name else path
    tasks = [t for t in asked.tasks if any(d.data == shown for d in harness.leaves([t], asked.include_path))]
    users = ", ".join(tasks or asked.tasks)
    cure = f"there is no folder {str(asked.data_dir / path)!r}" if asked.data_dir else "data_dir can name copies of it"
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"lm_eval {users}: the data set {shown!r} is not on this machine and the hub does not give it ({said}); {cure}"
    )


def _copy(folder: Path, name: str | None, load: Any) -> Any:
    """The splits in a folder: `train.jsonl`, `main/test-00000-of-00001.parquet`, … ; `name` may be a folder within."""
    from datasets.exceptions import DatasetsError

    root = folder / name if name and (folder / name).is_dir() else folder
    files = sorted(f for f in root.rglob("*") if f.suffix in KINDS and f.is_file())
    if not files:
        raise UserError(f"data_dir: {str(root)!r} holds no .parquet, .json or .jsonl")
    kinds = {KINDS[f.suffix] for f in files}
    if len(kinds) > 1:
        raise UserError(f"data_dir: {str(root)!r} holds both parquet and JSON; keep one")
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(str(file))
    try:
        return load(kinds.pop(), data_files=splits)
    except (OSError, ValueError, DatasetsError) as error:
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"data_dir: {str(root)!r} cannot be read: {first}") from None


def _split_of(file: Path) -> str:
    """`test` for `test.jsonl`, `gsm8k-test.jsonl`, `test-00000-of-00001.parquet`; else the name itself."""
    words = file.stem.replace("_", "-").replace(".", "-").split("-")
    known = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
    known |= {"val": "validation", "dev": "dev", "test": "test"}
    return next((known[w] for w in words if w in known), file.stem)


def depends(asked: Asked, limit: int | None) -> dict[str, str]:
    """What answers depend on: the hash of each single task, and that of a person's code as far as it is loaded now."""
    functions = [v for task in _single(built(asked)) for v in task.config.to_dict().values() if callable(v)]
    return {**hashes(asked, limit), "code": harness_sources.sha256(functions)}


@cache
def hashes(asked: Asked, limit: int | None = None) -> dict[str, str]:
    """One hash for each single task: its settings, its files, all the data that it reads, its questions as built."""
    places = [*_places(asked), *_own_code()]
    code = sha256_text(
        *(f"{name} {library_version(name)}" for name in SCORING),
        *(sha256_files([f]) for place in places for f in sorted(place.rglob("*")) if _is_code(f)),
    )
    return {
        task.config.task: sha256_text(code, _hash(task), _questions(task, asked, limit))
        for task in _single(built(asked))
    }


def _places(asked: Asked) -> list[Path]:
    return harness.folders(asked.tasks, asked.include_path)


def _own_code() -> list[Path]:
    """Where lm-eval keeps what metrics and filters compute; a checkout may be changed under one version."""
    import lm_eval

    root = Path(lm_eval.__file__).parent
    return [root / "api", root / "filters"]


def _is_code(file: Path) -> bool:
    return file.is_file() and file.suffix in ("", ".py", ".yaml", ".yml", ".txt", ".json", ".jsonl")


def _single(items: tuple[Any, ...]) -> Iterator[Any]:
    for item in items:
        yield from item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _hash(task: Any) -> str:
    total = hashlib.sha256(json.dumps(task.dump_config(), sort_keys=True, default=_named).encode())
    for split, rows in sorted(task.dataset.items(), key=lambda item: str(item[0])):
        total.update(str(split).encode())
        if hasattr(rows, "with_format"):
            for batch in rows.with_format("arrow").iter(10_000):
                for column in batch.column_names:
                    total.update(column.encode())
                    total.update(json.dumps(batch[column].to_pylist(), sort_keys=True, default=str).encode())
        else:
            total.update(json.dumps(list(rows), sort_keys=True, default=str).encode())
    return total.hexdigest()


def _questions(task: Any, asked: Asked, limit: int | None) -> str:
    """The hash of a task's requests and targets, built as `simple_evaluate` builds them, but for a chat template."""
    total = hashlib.sha256()
    shots = task.get_config("num_fewshot")
    if shots != 0:
        task.set_config(key="num_fewshot", value=shots or 0 if asked.num_fewshot is None else asked.num_fewshot)
    task.set_fewshot_seed(seed=SEED)
    try:
        with silent(), code_of_folders(asked):
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            for each in task.instances:
                told = (each.request_type, each.doc_id, each.arguments, task.doc_to_target(each.doc))
                total.update(json.dumps(told, sort_keys=True, default=str).encode())
    except Exception as error:  # noqa: BLE001 - the task will fail when it is asked, and say so then
        total.update(one_line(error).encode())
    return total.hexdigest()


def _named(value: Any) -> str:
    """A function by its name, for its address differs from run to run."""
    return getattr(value, "__qualname__", None) or f"{type(value).__name__} {value}"


def quiet() -> None:
    """lm-eval sets its loggers up when imported, and speaks of each setting that it was asked for."""
    import lm_eval  # noqa: F401

    for name in ("lm_eval", "huggingface_hub", "datasets"):  # what they have to say is said in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def silent() -> Any:
    """Its bars know no other way to be silent where nobody watches."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())

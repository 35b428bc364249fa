"""What lm-eval's task files say, read as text: importing the harness and indexing its 14,000 files takes far longer."""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmq import trust
from llmq.errors import UserError, did_you_mean
from llmq.files import bundled

OURS = bundled("evals") / "lm_eval"
NAME = re.compile(r"^[ \t\"]*(?:task|group|tag)\"?: *['\"]?([^\s'\"#\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """Names of tasks, and where their files and data may lie."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    data_dir: Path | None = None
    num_fewshot: int | None = None
    """lm-eval writes it into the task, which then takes no other."""


@dataclass(frozen=True)
class Definition:
    """A task, group or tag: the file that defines it, and what that says with its includes folded in."""

    name: str
    file: Path
    says: Mapping[str, Any]

    @property
    def version(self) -> Any:
        """The version of the task, or None."""
        return (self.says.get("metadata") or {}).get("version")

    @property
    def data(self) -> str:
        """The data set that it reads: `cais/mmlu (anatomy)`."""
        path, name = self.says.get("dataset_path"), self.says.get("dataset_name")
        return f"{path} ({name})" if name else str(path or "")


def check_names(names: Iterable[str], include_path: Path | None) -> None:
    """Raise `UserError` for the first name that no task file defines, neither of ours nor of lm-eval's."""
    for name in names:
        if not defined(name, include_path):
            known = [
                found for folder in _roots(include_path) for _, text in _files(folder) for found in NAME.findall(text)
            ]
            raise UserError(f"lm_eval has no task {name!r}{did_you_mean(name, known)}")


def defined(name: str, include_path: Path | None) -> tuple[Definition, ...]:
    """The task or group of a name, or all tasks that carry it as their tag; a person's own files come first."""
    found: tuple[Definition, ...] = ()
    for folder in _roots(include_path):
        found = found or _named(name, folder)
    return found


def leaves(names: Iterable[str], include_path: Path | None) -> Iterator[Definition]:
    """Every single task that the names stand for, groups and tags resolved."""
    for name in names:
        for definition in defined(name, include_path):
            yield from _within(definition, include_path)


def names_within(names: Iterable[str], include_path: Path | None) -> Iterator[str]:
    """The names that figures can bear: of the tasks, of the groups that hold them, and of the groups within."""
    for name in names:
        yield name
        for definition in defined(name, include_path):
            yield definition.name
            members = definition.says.get("task")
            inner = [m if isinstance(m, str) else m.get("task") for m in members] if isinstance(members, list) else []
            yield from names_within([m for m in inner if isinstance(m, str)], include_path)
            yield from (str(m["group"]) for m in members or () if isinstance(m, dict) and "group" in m)
        yield from (leaf.name for leaf in leaves([name], include_path))


def check_leaves(names: Iterable[str], include_path: Path | None, num_fewshot: int | None) -> None:
    """Raise `UserError` for a task that the names hold twice, or one that takes no examples and is to be given some."""
    seen: set[str] = set()
    for task in leaves(names, include_path):
        if task.name in seen:
            raise UserError(f"task {task.name!r} is asked for twice; name it, or what holds it, once")
        seen.add(task.name)
        if num_fewshot and task.says.get("num_fewshot") == 0:
            raise UserError(f"num_fewshot {num_fewshot}: task {task.name!r} takes no examples; leave it out")


def check_plain(names: Iterable[str], include_path: Path | None) -> None:
    """Raise `UserError` for a task of a person's own folder that calls code: functions, classes, metrics by a path."""
    files = {f for leaf in leaves(names, include_path) for f in with_includes(leaf.file)}
    files |= {f for name in names for its in defined(name, include_path) for f in with_includes(its.file)}
    for file in sorted(f for f in files if include_path and not is_carried(f)):
        if called := next(_code(_alone(file)), None):
            trust.need_remote_code(f"{str(file)!r} calls {called!r}, which is code that the folder brings")


def is_carried(file: Path) -> bool:
    """Whether a task file, or a folder of some, is llmq's own or lm-eval's."""
    return any(file.resolve().is_relative_to(root.resolve()) for root in _roots(None))


def _code(says: Any) -> Iterator[str]:
    """What a task file has run: functions, and metrics that are no plain names."""
    if isinstance(says, Function):
        yield says
    elif isinstance(says, dict):
        if says.get("hf_evaluate") or any(c in str(says.get("metric", "")) for c in "/\\."):
            yield str(says.get("metric"))
        for value in says.values():
            yield from _code(value)
    elif isinstance(says, list):
        for value in says:
            yield from _code(value)


def _within(definition: Definition, include_path: Path | None) -> Iterator[Definition]:
    members = definition.says.get("task")
    if not isinstance(members, list):
        yield definition
        return
    for member in members:
        says = {"task": member} if isinstance(member, str) else dict(member)
        name = str(says.pop("task", None) or says.pop("group", definition.name))
        inner = defined(name, include_path)
        for its in inner or (Definition(name, definition.file, {}),):
            yield from _within(Definition(its.name, its.file, {**its.says, **says}), include_path)


def folders(names: Iterable[str], include_path: Path | None) -> list[Path]:
    """The folders that must be indexed for the names to be found."""
    names = list(names)
    files = [d.file for name in names for d in defined(name, include_path)]
    every = {f for file in (*files, *(d.file for d in leaves(names, include_path))) for f in with_includes(file)}
    found = {f.parent for f in every}
    return sorted(f for f in found if not any(f != other and f.is_relative_to(other) for other in found))


def _roots(include_path: Path | None) -> Iterator[Path]:
    yield from filter(None, (include_path, OURS))
    spec = importlib.util.find_spec("lm_eval")
    if spec and spec.origin:
        yield Path(spec.origin).parent / "tasks"


@cache
def _named(name: str, folder: Path) -> tuple[Definition, ...]:
    # Most tasks lie in a folder that their names begin with; a tag may be spread over many.
    for place in (*(f for f in folder.iterdir() if f.is_dir() and name.startswith(f.name)), folder):
        for file in _mentioning(name, place):
            says = load(file)
            if file.suffix == ".yaml" and name in (says.get("task"), says.get("group")):
                return (Definition(name, file, says),)
    # A tag may stand in what a task file includes.
    near = sorted({f for file in _mentioning(name, folder) for f in file.parent.glob("*.yaml")})
    tagged = [(f, says) for f in near if name in _listed((says := load(f)).get("tag"))]
    return tuple(Definition(str(says.get("group") or says.get("task")), f, says) for f, says in tagged)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _mentioning(name: str, folder: Path) -> list[Path]:
    """The files with a line that may define the name."""
    key = r"(?:(?:task|group|tag)[\"']?[ \t]*:[ \t]*)?"
    line = re.compile(rf"^[ \t\"'-]*{key}[\"']?{re.escape(name)}[\"']?\s*(?:#.*)?$", re.MULTILINE)
    return [file for file, text in _files(folder) if name in text and line.search(text)]


@cache
def _files(folder: Path) -> tuple[tuple[Path, str], ...]:
    kinds = (".yaml", ".yml", "")  # templates have no suffix
    files = sorted(f for f in folder.rglob("*") if f.suffix in kinds and f.is_file())
    return tuple((f, f.read_text(encoding="utf-8", errors="replace")) for f in files)


class _Loader(yaml.CSafeLoader):
    """Reads a task file without running what it names."""


class Function(str):
    """The name of Python code that a task file calls."""


_Loader.add_constructor("!function", lambda loader, node: Function(node.value))


def with_includes(file: Path) -> Iterator[Path]:
    """A task file and all that it includes."""
    yield file
    for include in _listed(_alone(file).get("include")):
        yield from with_includes(file.parent / include)


def load(file: Path) -> dict[str, Any]:
    """A task file with what it includes, functions by their names; empty if it is no mapping or no YAML."""
    says = _alone(file)
    merged: dict[str, Any] = {}
    for include in _listed(says.pop("include", None)):
        merged.update(load(file.parent / include))
    return {**merged, **says}


def _alone(file: Path) -> dict[str, Any]:
    """What a task file says itself."""
    try:
        says = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, OSError):
        return {}
    return says if isinstance(says, dict) else {}

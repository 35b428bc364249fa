"""lm-eval's task files, read as text: importing lm-eval and indexing its 14,000 files takes far longer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from llmq import trust
from llmq.errors import UserError, did_you_mean, one_line
from llmq.files import bundled
from llmq.guarded import yaml_files
from llmq.guarded.files import read_text

OURS = bundled("evals") / "lm_eval"
MOST_INCLUDED = 100
NAME = re.compile(r"^[ \t\"]*(?:task|group|tag)\"?: *['\"]?([^\s'\"#\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """Names of tasks, and the folders of their files and data."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    data_dir: Path | None = None
    num_fewshot: int | None = None
    """The number of examples; lm-eval writes it into the task object, which then takes no other."""

    def definitions(self) -> Iterator[Definition]:
        """Every task and group that the names stand for, each group before its members."""
        for name in self.tasks:
            for definition in defined(name, self.include_path):
                yield from definition.within()

    def leaves(self) -> Iterator[Definition]:
        """Every single task that the names stand for."""
        return (definition for definition in self.definitions() if not definition.is_group)

    def files(self) -> set[Path]:
        """The task files, and all that they include."""
        return {file for definition in self.definitions() for file, _ in _parts(definition.file, set())}

    def folders(self) -> list[Path]:
        """The folders that must be indexed for the names to be found."""
        folders = {file.parent for file in self.files()}
        return sorted(f for f in folders if not any(f != other and f.is_relative_to(other) for other in folders))

    def check(self) -> None:
        """Raise `UserError` for an unknown name, a task that is named twice, or examples for a task that takes none.

        Also for a task file of a user's folder that calls Python without trust.
        """
        for name in self.tasks:
            if not defined(name, self.include_path):
                texts = [text for folder in _roots(self.include_path) for _, text in _files(folder)]
                known = [known_name for text in texts for known_name in NAME.findall(text)]
                raise UserError(f"lm_eval has no task {name!r}{did_you_mean(name, known)}")
        self.check_code()
        seen: set[str] = set()
        for task in self.leaves():
            if task.name in seen:
                raise UserError(f"task {task.name!r} is asked for twice; name it, or the group that holds it, once")
            seen.add(task.name)
            if self.num_fewshot and task.says.get("num_fewshot") == 0:
                raise UserError(f"num_fewshot {self.num_fewshot}: task {task.name!r} takes no examples; leave it out")

    def check_code(self) -> None:
        """Raise `UserError` for a task file of a user's folder that calls code without trust.

        Also for a file there that is no plain YAML of bounded size: lm-eval reads all of them to find a task.
        """
        own = self.include_path
        for file in sorted(own.rglob("*.yaml")) if own and not is_carried(own) else ():
            load(file)
        for file in sorted(f for f in self.files() if not is_carried(f)) if self.include_path else ():
            if called := next(_code(_alone(file)), None):
                trust.need_remote_code(f"{str(file)!r} calls {called!r}, which is code that the folder brings")


@dataclass(frozen=True)
class Definition:
    """A task or group: the file that defines it, and the settings there, included files folded in."""

    name: str
    file: Path
    says: Mapping[str, object]
    members: tuple[Definition, ...] = ()

    @property
    def is_group(self) -> bool:
        """True for a list of members, False for a single task."""
        return isinstance(self.says.get("task"), list)

    @property
    def version(self) -> object:
        """The version of the task, or None."""
        metadata = self.says.get("metadata")
        return metadata.get("version") if isinstance(metadata, dict) else None

    @property
    def data(self) -> str:
        """The data set of the task: `cais/mmlu (anatomy)`."""
        path, name = self.says.get("dataset_path"), self.says.get("dataset_name")
        return f"{path} ({name})" if name else str(path or "")

    def within(self) -> Iterator[Definition]:
        """The definition itself, then all members, however deep."""
        yield self
        for member in self.members:
            yield from member.within()


def defined(name: str, include_path: Path | None, above: tuple[str, ...] = ()) -> tuple[Definition, ...]:
    """The task or group of a name, or all tasks with the name as their tag; files of the user come first."""
    if name in above:
        raise UserError(f"lm_eval: the group {name!r} holds itself")
    for folder in _roots(include_path):
        if files := _defining(name, folder):
            inside = (*above, name)
            return tuple(_definition(own, file, load(file), include_path, inside) for own, file in files)
    return ()


def _definition(
    name: str, file: Path, says: Mapping[str, object], include_path: Path | None, above: tuple[str, ...]
) -> Definition:
    listed = says.get("task")
    members: list[Definition] = []
    for member in listed if isinstance(listed, list) else ():
        # A member is a name, or a mapping with a name and settings of its own.
        about = {"task": member} if isinstance(member, str) else dict(member)
        own = about["task"] if isinstance(about.get("task"), str) else about.get("group", name)
        settings = {key: value for key, value in about.items() if key != "group" and value != own}
        inner = defined(str(own), include_path, above)
        members += [replace(definition, says={**definition.says, **settings}) for definition in inner]
        if not inner:  # a member that is defined in place
            members.append(_definition(str(own), file, settings, include_path, above))
    return Definition(name, file, says, tuple(members))


def is_carried(file: Path) -> bool:
    """True for a task file, or a folder of some, that llmq or lm-eval carries."""
    return any(file.resolve().is_relative_to(root.resolve()) for root in _roots(None))


def _code(says: object) -> Iterator[str]:
    """The functions that a task file calls, and metrics that load code instead of naming a known one."""
    if isinstance(says, Function):
        yield says
    elif isinstance(says, dict):
        if says.get("hf_evaluate") or any(c in str(says.get("metric", "")) for c in "/\\."):
            yield str(says.get("metric"))
        yield from _code(list(says.values()))
    elif isinstance(says, list):
        for value in says:
            yield from _code(value)


def _roots(include_path: Path | None) -> Iterator[Path]:
    yield from filter(None, (include_path, OURS))
    spec = importlib.util.find_spec("lm_eval")
    if spec and spec.origin:
        yield Path(spec.origin).parent / "tasks"


@cache
def _defining(name: str, folder: Path) -> tuple[tuple[str, Path], ...]:
    """The file of a task or group; of a tag the tasks that carry it, and their files."""
    # Most tasks lie in a folder that their names begin with; a tag may be spread over many.
    for place in (*(f for f in folder.iterdir() if f.is_dir() and name.startswith(f.name)), folder):
        for file in _mentioning(name, place):
            says = load(file) if file.suffix == ".yaml" else {}
            if name in (says.get("task"), says.get("group")):
                return ((name, file),)
    # A tag may stand in an included file.
    near = sorted({f for file in _mentioning(name, folder) for f in file.parent.glob("*.yaml")})
    tagged = [(f, says) for f in near if name in _listed((says := load(f)).get("tag"))]
    return tuple((str(says.get("group") or says.get("task")), f) for f, says in tagged)


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []


def _mentioning(name: str, folder: Path) -> list[Path]:
    """The files with a line that may define the name."""
    key = r"(?:(?:task|group|tag)[\"']?[ \t]*:[ \t]*)?"
    line = re.compile(rf"^[ \t\"'-]*{key}[\"']?{re.escape(name)}[\"']?\s*(?:#.*)?$", re.MULTILINE)
    return [file for file, text in _files(folder) if name in text and line.search(text)]


@cache
def _files(folder: Path) -> tuple[tuple[Path, str], ...]:
    """The task files of a folder, and templates, which have no suffix, with their texts."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".yaml", ".yml", "") and f.is_file())
    short = [f for f in files if f.stat().st_size <= 4 * yaml_files.LONGEST]
    return tuple((f, f.read_text(encoding="utf-8", errors="replace")) for f in short)


class _Loader(yaml.CSafeLoader):
    """Reads a task file without running any code that the file names."""


class Function(str):
    """The name of Python code that a task file calls."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))  # type: ignore[arg-type]


def load(file: Path) -> dict[str, object]:
    """A task file with included files folded in, functions by name; empty for a file that is no mapping."""
    return {key: value for _, says in _parts(file, set()) for key, value in says.items() if key != "include"}


def _parts(file: Path, seen: set[Path]) -> Iterator[tuple[Path, Mapping[str, object]]]:
    """The settings in a task file, after those of each included file; of two the later counts.

    Raises `UserError` for a file that is included twice, as lm-eval does.
    """
    place = file.resolve()
    if place in seen or len(seen) == MOST_INCLUDED:
        raise UserError(f"{str(file)!r} is included twice, or with more than {MOST_INCLUDED} others")
    seen.add(place)
    says = _alone(file)
    for include in _listed(says.get("include")):
        yield from _parts(file.parent / str(include), seen)
    yield file, says


@cache
def _alone(file: Path) -> Mapping[str, object]:
    """The settings in a task file itself. An unreadable file that llmq or lm-eval carries is empty."""
    try:
        node = yaml_files.compose(read_text(file, 4 * yaml_files.LONGEST), str(file))
        says = _Loader("").construct_document(node) if node else None
    except (UserError, yaml.YAMLError, ValueError) as error:
        if is_carried(file):
            return {}
        if isinstance(error, UserError):
            raise
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{str(file)!r} is no plain YAML: {problem}") from None
    return says if isinstance(says, dict) else {}

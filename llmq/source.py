"""YAML data with the file and the line of each part."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llmq import plugin
from llmq.errors import UserError, did_you_mean
from llmq.files import bundled
from llmq.guarded import files as guarded_files
from llmq.guarded import yaml_files
from llmq.types import JsonObject

Place = tuple[str | int, ...]


@dataclass
class Source:
    """Plain data, and the line of each part in the file `name`."""

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)
    files: dict[Place, str] = field(default_factory=dict)
    """The files of parts that come from another file, by place."""

    def where(self, place: Place) -> str:
        """`file:line` of the innermost known part of `place`."""
        while place and place not in self.lines:
            place = place[:-1]
        line = self.lines.get(place, 0)
        name = next((file for within, file in self.files.items() if place[: len(within)] == within != place), self.name)
        return f"{name}:{line}" if line > 0 else name if line == 0 else "command line"

    def overridden(self, place: Place) -> list[Place]:
        """The places within `place` that the command line set."""
        return [at for at, line in self.lines.items() if line < 0 and at[: len(place)] == place]

    def at(self, place: Place) -> Any:
        """The data at a place."""
        value = self.data
        for key in place:
            value = value[key]
        return value

    def embed(self, key: str, other: "Source") -> None:
        """Put the data of another file under `key`; errors go on naming that file and its lines."""
        self.data[key] = other.data
        self.lines.update({(key, *place): line for place, line in other.lines.items() if place})
        self.files[(key,)] = other.name


def read(path: Path) -> Source:
    """Parse YAML, keeping line numbers."""
    return parsed(guarded_files.read_text(path, 4 * yaml_files.LONGEST), str(path))


def parsed(text: str, name: str) -> Source:
    """Parse the text of a YAML file."""
    node = yaml_files.compose(text, name)
    source = Source(name, None)
    source.data = _plain(node, (), source) if node else {}
    return source


def value_of(text: str) -> Any:
    """The plain value that YAML in a command line stands for."""
    node = yaml_files.compose(text, "command line")
    return _plain(node, (), Source("command line", None)) if node else None


def _plain(node: yaml.Node, place: Place, source: Source) -> Any:
    line = node.start_mark.line + 1
    source.lines.setdefault(place, line)
    where = f"{source.name}:{line}"
    if isinstance(node, yaml.MappingNode):
        yaml_files.check_collection(node, where)
        data: JsonObject = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = yaml_files.key(key_node, f"{source.name}:{line}")
            if key in data:
                raise UserError(f"{source.name}:{line}: {key!r} stands twice; keep one")
            source.lines[(*place, key)] = line
            data[key] = _plain(value_node, (*place, key), source)
        return data
    if isinstance(node, yaml.SequenceNode):
        yaml_files.check_collection(node, where)
        return [_plain(child, (*place, i), source) for i, child in enumerate(node.value)]
    return yaml_files.scalar(node, where)


Kind = Literal["recipes", "sweeps", "evals"]
"""What is bundled; suites lie in one folder, recipes and sweeps in one for each field."""
KINDS: tuple[Kind, ...] = get_args(Kind)


def find(kind: Kind, name: str) -> Path:
    """The YAML file that `name` means: a path, or a bundled name such as `text/quickstart`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"there is no file {name!r}")
    known = names(kind)
    if name not in known:
        noun = {"recipes": "recipe", "sweeps": "sweep", "evals": "suite"}[kind]
        hint = did_you_mean(name, known) or f"; llmq list {kind} names them"
        raise UserError(f"unknown {noun} {name!r}{hint}")
    return known[name]


def names(kind: Kind) -> dict[str, Path]:
    """The bundled recipes, sweeps or suites."""
    root = bundled(kind)
    files = sorted(root.glob("*.yaml" if kind == "evals" else "*/*.yaml"))
    return {str(f.relative_to(root).with_suffix("")): f for f in files}


def word_at(source: Source, place: Place, value: Any) -> tuple[str, JsonObject]:
    """The word at a place, and the settings of the word. Raises `UserError` with the place."""
    try:
        return plugin.name_and_settings(value)
    except UserError as error:
        raise UserError(f"{source.where(place)}: {error}") from None


def with_suite(source: Source) -> None:
    """Replace the name of a suite in a recipe by the tasks of the suite."""
    suite = source.data.get("evaluate")
    if not isinstance(suite, str):
        return
    try:
        found = read(find("evals", suite))
    except UserError as error:
        raise UserError(f"{source.where(('evaluate',))}: {error}") from None
    if not isinstance(found.data, list):
        raise UserError(f"{found.where(())}: a suite is a list of tasks; begin each with '- '")
    source.embed("evaluate", found)


def to_flow(value: object) -> str:
    """A value as YAML in one line."""
    plain = json.loads(json.dumps(value, default=str))
    return (
        str(yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)).split("\n...")[0].strip()
    )


def to_yaml(plain: JsonObject) -> str:
    """Block-style YAML, with keys in the given order."""
    return str(
        yaml.safe_dump(json.loads(json.dumps(plain, default=str)), sort_keys=False, allow_unicode=True, width=110)
    )

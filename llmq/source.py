"""YAML with the line of the file where each part of it stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmq.errors import UserError

Place = tuple[str | int, ...]
DEEPEST = 32


@dataclass
class Source:
    """Plain data, and the line of the file where each part of it stands."""

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`file:line` of the innermost known part of `place`."""
        while place and place not in self.lines:
            place = place[:-1]
        line = self.lines.get(place, 0)
        return f"{self.name}:{line}" if line > 0 else self.name if line == 0 else "command line"


def read(path: Path) -> Source:
    """Parse YAML, keeping line numbers."""
    try:
        node = yaml.compose(path.read_text(), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    source = Source(str(path), None)
    source.data = _plain(node, (), source) if node else {}
    return source


def _plain(node: yaml.Node, place: Place, source: Source) -> Any:
    source.lines.setdefault(place, node.start_mark.line + 1)
    if len(place) > DEEPEST:
        raise UserError(f"{source.where(place)}: nested deeper than any recipe; does an alias (*) stand inside itself?")
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in data:
                raise UserError(f"{source.name}:{line}: {key!r} stands twice; keep one")
            source.lines[(*place, key)] = line
            data[key] = _plain(value_node, (*place, key), source)
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*place, i), source) for i, child in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError):  # a tag that is not YAML's own, a thirteenth month
        raise UserError(f"{source.where(place)}: {node.value!r} cannot be read as {node.tag!r}") from None

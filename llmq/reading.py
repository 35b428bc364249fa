"""What the steps and tasks of a run read, and where a task reads what no one named: the run's own data."""

from collections.abc import Iterable, Iterator

from llmq import plugin
from llmq.types import Data, Plugin, Task


def data_of(part: Plugin) -> Iterator[Data]:
    """Every data set among the settings of a step or a task."""
    return (its for _, its in part.parts() if isinstance(its, Data))


def called(data: Data) -> str:
    """A data set in a line: `data.file my.jsonl`, `data.rock scale=3`."""
    settings = plugin.to_plain(data)
    path = settings.pop("path", None)
    told = [str(path)] if path is not None else []
    return " ".join([data.word, *told, *(f"{key}={value}" for key, value in settings.items())])


def hashes(parts: Iterable[Plugin]) -> dict[str, str]:
    """The hash of all that these steps and tasks read, every row of it checked."""
    parts = list(parts)
    found = {called(data): data.read().sha256 for part in parts for data in data_of(part)}
    others = {f"{p.name} {k}": str(v) for p in parts if isinstance(p, Task) for k, v in (p.depends() or {}).items()}
    return found | others

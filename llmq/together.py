"""Questions to open models that the processes of one launcher answer together: the first asks, each answers a share.

The first process alone decides what is asked, and in which order. The others `follow`: they open a model at the first
question about it, and send their answers to the first. Each computes every N-th batch, so that the batches, and all
sums over the answers, are those of a process that is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from llmq import processes
from llmq.errors import LlmqError, one_line

if TYPE_CHECKING:
    from llmq.artifact import Artifact
    from llmq.types import Loaded

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Share:
    """Every `processes`-th item, counted from number `process`."""

    process: int = 0
    processes: int = 1

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        return islice(items, self.process, None, self.processes)

    def in_batches(self, count: int, size: int) -> list[int]:
        """The numbers of the items in every `processes`-th batch, of `count` items in batches of `size`."""
        return [i for begin in self.of(range(0, count, size)) for i in range(begin, min(count, begin + size))]


@dataclass
class Crew:
    """The processes that answer, as the first one sees them."""

    device: str
    opened: list[Loaded] = field(default_factory=list)
    """The models that the first process has open."""
    asked: bool = False
    """True once the others were asked something."""


@dataclass(frozen=True)
class Question:
    """What the first process sends: `work` on open models, or without work the end of models, or without these of all.

    `work(models, share)` returns answers by the number of what was asked about.
    """

    work: Callable[[Sequence[Loaded], Share], Mapping[int, object]] | None
    models: tuple[Artifact, ...]


Work = Callable[[Sequence["Loaded"], Share], Mapping[int, Found]]
"""A function that other processes can import, or a `partial` of one: open models and a share to numbered answers."""
Told = tuple[Mapping[int, Any], str]
"""The answers of one process, and its error in one line, which is empty without one."""
_crew: list[Crew] = []
"""The crew that the first process leads, if it leads one."""


@contextmanager
def leading(device: str) -> Iterator[None]:
    """Lead the other processes, which `follow`, until the block ends; it must run in the first process."""
    if processes.count() == 1:
        yield
        return
    _crew.append(Crew(device))
    try:
        yield
    except Exception:  # an interrupt instead ends this process, and the launcher then ends the others
        _send(Question(None, ()), device)
        raise
    else:
        _send(Question(None, ()), device)
    finally:
        _crew.pop()


@contextmanager
def opened(artifact: Artifact, device: str) -> Iterator[Loaded]:
    """Open a model; the other processes, if some follow, can be asked about it until the block ends."""
    with artifact.open(device) as loaded:
        if not _crew:
            yield loaded
            return
        crew = _crew[-1]
        crew.opened.append(loaded)
        try:
            yield loaded
        finally:
            crew.opened.remove(loaded)
            if crew.asked:
                _send(Question(None, (artifact,)), crew.device)


def count() -> int:
    """The number of processes that have answered the questions since they follow; 1 if the first did so alone."""
    return processes.count() if _crew and _crew[-1].asked else 1


def answers(
    work: Callable[..., Mapping[int, Found]], modules: Sequence[object], device: str, *arguments: object
) -> list[Found]:
    """The answers of `work(*modules, device, share, *arguments)` in the order of their numbers.

    Each process computes a share. `device` is that of the last module, which may be another than that of the run.
    Modules that the others cannot open, because no artifact was `opened` as them, are asked by this process alone.
    """
    known = [loaded for module in modules if (loaded := opened_as(module))]
    if len(known) < len(modules):
        return _in_order(work(*modules, device, Share(), *arguments))
    return answers_of(partial(_by_modules, work, arguments), known)


def _by_modules(
    work: Callable[..., Mapping[int, Found]], arguments: tuple[object, ...], models: Sequence[Loaded], share: Share
) -> Mapping[int, Found]:
    return work(*(one.module for one in models), models[-1].device, share, *arguments)


def opened_as(module: object) -> Loaded | None:
    """The open model of a module that the other processes can open, too; None where they cannot, or nobody follows."""
    return next((one for one in _crew[-1].opened if one.module is module), None) if _crew else None


def are_led() -> bool:
    """True in the first process while the others follow."""
    return bool(_crew)


def answers_of(
    work: Work[Found], models: Sequence[Loaded], own: Callable[[Share], Mapping[int, Found]] | None = None
) -> list[Found]:
    """The answers of `work(models, share)` in the order of their numbers, each process having computed a share.

    The first process computes its `own` in another way where it has at hand what `work` must make anew.
    """
    here = own or partial(work, models)
    if not _crew or not all(one in _crew[-1].opened for one in models):
        return _in_order(here(Share()))
    crew = _crew[-1]
    crew.asked = True
    _send(Question(work, tuple(one.artifact for one in models)), crew.device)
    error: Exception | None = None
    answered: Mapping[int, Found] = {}
    try:
        answered = here(Share(0, processes.count()))
    except Exception as failed:  # noqa: BLE001 - the others must not wait with their answers for ever
        error = failed
    told = _gathered((answered, ""), crew.device)
    if error:
        raise error
    for process, (_, why) in enumerate(told):
        if why:
            raise LlmqError(f"process {process} of {processes.count()}: {why}")
    merged = {i: answer for part, _ in told for i, answer in part.items()}
    if sorted(i for part, _ in told for i in part) != list(range(len(merged))):
        raise LlmqError(f"{processes.count()} processes shared the questions out unlike one another; start one process")
    return _in_order(merged)


def _in_order(found: Mapping[int, Found]) -> list[Found]:
    return [found[i] for i in sorted(found)]


def follow(device: str) -> None:
    """Answer what the first process asks, until it leads no more."""
    models: list[tuple[Artifact, Loaded, ExitStack]] = []
    while True:
        asked = _received(device)
        if asked.work:
            _gathered(_answered(asked, models, device), device)
            continue
        for artifact, _, held in [m for m in models if not asked.models or m[0] in asked.models]:
            held.close()
            models = [m for m in models if m[0] != artifact]
        if not asked.models:
            return


def _answered(asked: Question, models: list[tuple[Artifact, Loaded, ExitStack]], device: str) -> Told:
    """This process's share of the answers; models that are not open yet are opened."""
    assert asked.work
    try:
        for artifact in asked.models:
            if all(artifact != known for known, _, _ in models):
                held = ExitStack()
                models.append((artifact, held.enter_context(artifact.open(device)), held))
        loaded = [next(one for known, one, _ in models if known == artifact) for artifact in asked.models]
        return dict(asked.work(loaded, Share(processes.number(), processes.count()))), ""
    except Exception as error:  # noqa: BLE001 - of any kind: the first process raises it
        return {}, one_line(error)


@cache
def _group(device: str) -> Any:
    """A group of all processes for objects of Python, which gloo sends from main memory whatever the device."""
    import torch.distributed as dist

    processes.join(device)
    return dist.new_group(backend="gloo", timeout=processes.PATIENCE)


def _send(question: Question, device: str) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([question], src=0, group=_group(device))


def _received(device: str) -> Question:
    import torch.distributed as dist

    place: list[Any] = [None]
    dist.broadcast_object_list(place, src=0, group=_group(device))
    question: Question = place[0]
    return question


def _gathered(told: Told, device: str) -> list[Told]:
    """What all processes tell, in the first one; nothing in the others."""
    import torch.distributed as dist

    every: list[Any] | None = [None] * processes.count() if processes.is_first() else None
    dist.gather_object(told, every, dst=0, group=_group(device))
    return every or []

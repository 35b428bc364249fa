"""What the steps and tasks of a run read, and where nobody named it: the run's own data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.needs import Needs
from llmq.types import Data, Model, Plugin, Step, Task

P = TypeVar("P", Step, Task)
USES = {"training": "trains on", "calibration": "calibrates on", "comparison": "compares on"}


def named(tasks: Sequence[Task]) -> dict[str, Task]:
    """Tasks by the name that their measurements go under; the second of one word is `perplexity-2`."""
    names: dict[str, Task] = {}
    for task in tasks:
        number = 1 + sum(other.name == task.name for other in names.values())
        names[task.name if number == 1 else f"{task.name}-{number}"] = task
    return names


def data_of(part: Plugin) -> Iterator[Data]:
    """Every data set among the settings of a step or a task."""
    return (its for _, its in part.parts() if isinstance(its, Data))


def with_own_data(steps: Sequence[Step], kind: str, made_by: Sequence[Step] = ()) -> tuple[Step, ...]:
    """Steps whose unset data is what the last step before them trains on, where there is such a step.

    `made_by` are the steps of the run that the model comes from.
    """
    known = list(made_by)
    for step in steps:
        trained = [one for one in known if one.uses == "training"]
        known.append(_reading(step, kind, trained))
    return tuple(known[len(made_by) :])


def with_data_of(tasks: Sequence[Task], kind: str, steps: Sequence[Step], asked: Sequence[Task] = ()) -> list[Task]:
    """Tasks whose unset data is the run's: what the task of its name reads among those that the run `asked` already.

    Else what the last step trains on, else what the last calibrates on, else the task's own default.
    """
    before = named(asked)
    found = []
    for name, task in named(tasks).items():
        same = before.get(name)
        told = {f: getattr(same, f) for f in task.unset_data(kind) if same and isinstance(getattr(same, f), Data)}
        found.append(_reading(task.model_copy(update=told), kind, steps))
    return found


def _reading(part: P, kind: str, steps: Sequence[Step]) -> P:
    defaults = part.unset_data(kind)
    return part.model_copy(update={name: _first(part, steps) or its for name, its in defaults.items()})


def _first(part: Step | Task, steps: Sequence[Step]) -> Data | None:
    """The data of the last step that trains, else of the last that calibrates, that can have a shape the part takes."""
    shapes = part.shapes if isinstance(part, Task) else frozenset()
    for use in ("training", "calibration"):
        for step in reversed([step for step in steps if step.uses == use]):
            for data in data_of(step):
                if not (shapes and data.shapes) or shapes & data.shapes:
                    return data
    return None


def called(data: Data) -> str:
    """A data set in a line: `data.file my.jsonl`, `data.rock scale=3`."""
    settings = plugin.to_plain(data)
    path = settings.pop("path", None)
    told = [str(path)] if path is not None else []
    return " ".join([data.word, *told, *(f"{key}={value}" for key, value in settings.items())])


def told(steps: Sequence[Step], tasks: Sequence[Task], made_by: Sequence[Step] = ()) -> list[str]:
    """A line for each data set that each step and task reads: which, and which step of the run reads it as well.

    `made_by` are the steps of the run that the model comes from.
    """
    lines = [f"{step.word} {USES[step.uses]} {called(data)}" for step in steps for data in data_of(step)]
    for name, task in named(tasks).items():
        for data in data_of(task):
            users = {step.word: USES[step.uses] for step in (*made_by, *steps) if data in data_of(step)}
            why = next((f"what {word} {use}" for word, use in users.items()), "which no step reads")
            lines.append(f"{name} reads {called(data)}, {why}")
    return lines


def counted(parts: Iterable[Plugin]) -> list[str]:
    """A line for each data set: how much of it there is to train on and held out, of which shape and classes."""
    lines = []
    for name, data in {called(data): data for part in parts for data in data_of(part)}.items():
        split = data.read()
        classes = f", {len(split.classes)} classes" if split.classes else ""
        sides = f"{len(split.train)} to train on, {len(split.held_out)} held out"
        lines.append(f"{name}: {sides}, {split.shape}{classes}")
    return lines


def check_base(
    where: str, steps: Sequence[Step], tasks: Sequence[Task], base: Artifact, made_by: Sequence[Step] = ()
) -> None:
    """See that the base can be changed and asked so; `made_by` are steps that it went through before.

    Raises `UserError`. The base and all data are there by now.
    """
    has_classes = type(base.model).outputs_of is not Model.outputs_of
    before = [data for data in _trained_on(made_by) if has_classes and is_here(data)]
    learned = {called(data): base.model.outputs_of(data.read()) for data in before}
    parts: list[tuple[str, Step | Task]] = [*((step.word, step) for step in steps), *named(tasks).items()]
    needs: dict[str, Needs] = {}
    for name, part in parts:
        with asking(where, name):
            needs[name] = part.needs()
    with asking(where):
        base.model.check_fits(base, needs)
    for name, part in parts:
        with asking(where, name):
            part.check_base(base)
            for data in data_of(part):
                if isinstance(part, Step) and part.uses == "calibration" and not len(data.read().train):
                    raise UserError(f"it calibrates on {called(data)}, whose training part is empty")
                if has_classes:  # of rows of text each reading may take minutes
                    outputs = base.model.outputs_of(data.read())
                    _check_classes(outputs, learned, called(data))
                    learned |= {called(data): outputs} if data in _trained_on([part]) else {}


@contextmanager
def asking(*who: str) -> Iterator[None]:
    """Put before an error who was asked: a step or a task does not name itself."""
    try:
        yield
    except LlmqError as error:
        raise type(error)(": ".join((*who, str(error)))) from error


def _trained_on(parts: Iterable[Plugin]) -> list[Data]:
    return [data for part in parts if isinstance(part, Step) and part.uses == "training" for data in data_of(part)]


def is_here(data: Data) -> bool:
    """Whether data that a run read still lies where it did."""
    try:
        data.check()
    except UserError:
        return False
    return True


def _check_classes(outputs: Mapping[int, str], learned: Mapping[str, Mapping[int, str]], data: str) -> None:
    """Raise `UserError` if an output was taught as one class and stands for another here."""
    for other, its in learned.items():
        for place, name in outputs.items():
            if place in its and its[place].lower() != name.lower():
                raise UserError(
                    f"class {place} of {data} is {name!r}, and the network learns {its[place]!r} there from {other}; "
                    "both need the same classes in the same order"
                )


def hashes(parts: Iterable[Plugin]) -> dict[str, str]:
    """The hash of all that these steps and tasks read, every row of it checked."""
    parts = list(parts)
    found = {called(data): data.read().sha256 for part in parts for data in data_of(part)}
    others = {f"{p.name} {k}": str(v) for p in parts if isinstance(p, Task) for k, v in (p.depends() or {}).items()}
    return found | others

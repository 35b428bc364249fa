"""The data that the steps and tasks of a run read; by default, the run's own data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from llmq import plugin
from llmq.errors import LlmqError, UserError
from llmq.types import Data, Model, Needs, Plugin, Step, Task

if TYPE_CHECKING:
    from llmq.artifact import Artifact

P = TypeVar("P", Step, Task)
USES = {"training": "trains on", "calibration": "calibrates on", "comparison": "compares on"}


def by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    """Tasks by the name that their measurements go under; the second of one word is `perplexity-2`."""
    names: dict[str, Task] = {}
    for task in tasks:
        number = 1 + sum(other.name == task.name for other in names.values())
        names[task.name if number == 1 else f"{task.name}-{number}"] = task
    return names


def data_of(part: Plugin) -> Iterator[Data]:
    """Every data set among the settings of a step or a task."""
    return (inner for _, inner in part.parts() if isinstance(inner, Data))


def with_own_data(steps: Sequence[Step], kind: str, made_by: Sequence[Step] = ()) -> tuple[Step, ...]:
    """The steps; unset data becomes the training data of the last step before that trains, if there is one.

    `made_by` are the steps of the run that the model comes from.
    """
    known = list(made_by)
    for step in steps:
        trained = [one for one in known if one.uses == "training"]
        known.append(_reading(step, kind, trained))
    return tuple(known[len(made_by) :])


def with_data_of(tasks: Sequence[Task], kind: str, steps: Sequence[Step], asked: Sequence[Task] = ()) -> list[Task]:
    """The tasks; unset data becomes that of the task of the same name among those that the run `asked` before.

    Else the training data of the last step that trains, else the last calibration data, else the task's own default.
    """
    before = by_name(asked)
    found = []
    for name, task in by_name(tasks).items():
        same = before.get(name)
        told = {f: getattr(same, f) for f in task.unset_data(kind) if same and isinstance(getattr(same, f), Data)}
        found.append(_reading(task.model_copy(update=told), kind, steps))
    return found


def _reading(part: P, kind: str, steps: Sequence[Step]) -> P:
    defaults = part.unset_data(kind)
    return part.model_copy(update={name: _first(part, steps) or default for name, default in defaults.items()})


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
    """A line for each data set that a step or task reads, with the step of the run that reads the same data.

    `made_by` are the steps of the run that the model comes from.
    """
    lines = [f"{step.word} {USES[step.uses]} {called(data)}" for step in steps for data in data_of(step)]
    for name, task in by_name(tasks).items():
        for data in data_of(task):
            users = {step.word: USES[step.uses] for step in (*made_by, *steps) if data in data_of(step)}
            why = next((f"what {word} {use}" for word, use in users.items()), "which no step reads")
            lines.append(f"{name} reads {called(data)}, {why}")
    return lines


def counted(parts: Iterable[Plugin]) -> list[str]:
    """A line for each data set: numbers of training and held-out examples, shape and number of classes."""
    lines = []
    for name, data in {called(data): data for part in parts for data in data_of(part)}.items():
        split = data.read()
        classes = f", {len(split.classes)} classes" if split.classes else ""
        sides = f"{len(split.train)} to train on, {len(split.held_out)} held out"
        lines.append(f"{name}: {sides}, {split.shape}{classes}")
    return lines


def check_base(
    where: str, steps: Sequence[Step], tasks: Sequence[Task], base: "Artifact", made_by: Sequence[Step] = ()
) -> None:
    """Check that the steps and tasks suit the base; `made_by` are the steps that made it.

    Raises `UserError`. The base and all data are there by now.
    """
    has_classes = type(base.model).outputs_of is not Model.outputs_of
    before = [data for data in _trained_on(made_by) if has_classes and is_here(data)]
    learned = {called(data): base.model.outputs_of(data.read()) for data in before}
    parts: list[tuple[str, Step | Task]] = [*((step.word, step) for step in steps), *by_name(tasks).items()]
    needs: dict[str, Needs] = {}
    for name, part in parts:
        with asking(where, name):
            needs[name] = part.needs()
    with asking(where):
        base.model.check_fits(base, needs)
    for name, part in parts:
        with asking(where, name):
            if isinstance(part, Step) and (runtime := part.left.get("runtime")):
                base.model.check_runtime(str(runtime))
            part.check_base(base)
            for data in data_of(part):
                if isinstance(part, Step) and part.uses == "calibration" and not len(data.read().train):
                    raise UserError(f"it calibrates on {called(data)}, whose training part is empty")
                if has_classes:  # each reading of rows of text may take minutes
                    outputs = base.model.outputs_of(data.read())
                    _check_classes(outputs, learned, called(data))
                    learned |= {called(data): outputs} if data in _trained_on([part]) else {}


@contextmanager
def asking(*who: str) -> Iterator[None]:
    """Prefix an error with the name of the step or task that raised it."""
    try:
        yield
    except LlmqError as error:
        raise type(error)(": ".join((*who, str(error)))) from error


def _trained_on(parts: Iterable[Plugin]) -> list[Data]:
    return [data for part in parts if isinstance(part, Step) and part.uses == "training" for data in data_of(part)]


def is_here(data: Data) -> bool:
    """True for data that still lies where the run read it."""
    try:
        data.check()
    except UserError:
        return False
    return True


def _check_classes(outputs: Mapping[int, str], learned: Mapping[str, Mapping[int, str]], data: str) -> None:
    """Raise `UserError` if an output was taught as one class and stands for another here."""
    for other, classes in learned.items():
        for place, name in outputs.items():
            if place in classes and classes[place].lower() != name.lower():
                raise UserError(
                    f"class {place} of {data} is {name!r}, and the network learns {classes[place]!r} there from "
                    f"{other}; both need the same classes in the same order"
                )


def hashes(parts: Iterable[Plugin]) -> dict[str, str]:
    """The hashes of all data that these steps and tasks read; every row is checked."""
    parts = list(parts)
    found = {called(data): data.read().sha256 for part in parts for data in data_of(part)}
    others = {f"{p.name} {k}": str(v) for p in parts if isinstance(p, Task) for k, v in (p.depends() or {}).items()}
    return found | others

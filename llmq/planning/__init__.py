"""A run foretold before a weight is read: sizes, memory and time of each stage, and what will not fit, with a cure.

The model, each step and each task say themselves what they take (`sketch`, `foresee`), and by which settings they
would take less (`smaller`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import reading
from llmq.errors import UserError, free_bytes, in_bytes, one_line
from llmq.sketch import Work
from llmq.types import JsonObject

if TYPE_CHECKING:
    from llmq.recipe import Recipe
    from llmq.sketch import Kind, Sketch
    from llmq.types import Plugin

LIBRARIES = 1_000_000_000
"""Resident bytes of a process with all libraries loaded and no model, about (`NOTES.md`); of a card they take none."""

AROUND = 2.5
"""Seconds of a run besides its steps and tasks: libraries that load on the way, the base from the cache, the report."""


@dataclass(frozen=True)
class Foretold:
    """One stage. Memory is the peak above the process without a model; None is unknown."""

    name: str
    parameters: int | None
    bytes_on_disk: int | None
    bytes_in_memory: int | None
    peak_of_step: int | None
    peak_of_tasks: int | None
    seconds_of_step: float | None
    seconds_of_tasks: float | None
    tasks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Name of each task -> `peak_memory` and `seconds`."""
    unknown: tuple[str, ...] = ()
    """The reasons for what is not known, or known only about."""


@dataclass(frozen=True)
class Misfit:
    """A part of the run that this machine has no room for, and the nearest setting that would fit."""

    stage: str
    part: str
    what: str
    needed: int
    there: int
    cure: str

    def __str__(self) -> str:
        if self.what == "disk":
            return (
                f"the run needs about {in_bytes(self.needed)} of disk, and {in_bytes(self.there)} are free; {self.cure}"
            )
        told = f"{self.stage}: {self.part} needs about {in_bytes(self.needed)} of {self.what}"
        return f"{told}, and {in_bytes(self.there)} are there; {self.cure}"


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    recipe: str
    stages: tuple[Foretold, ...]
    seconds: float | None
    peak_memory: int | None
    """Above the process without a model, which itself takes `libraries`; None if a stage is not known."""
    disk: int | None
    download: str
    download_bytes: int
    machine: Mapping[str, float]
    rates: Mapping[str, float]
    misfits: tuple[Misfit, ...] = field(default=())
    libraries: int = LIBRARIES
    """Bytes of the libraries in the memory that the model is in: 0 on a card."""

    def plain(self) -> JsonObject:
        """The plan as JSON holds it."""
        return asdict(self)

    def line(self) -> str:
        """Time, memory and disk of the run."""
        time = "a time that is not known" if self.seconds is None else f"about {duration(self.seconds)}"
        if self.peak_memory is None or self.disk is None:
            return f"foretold: nothing; {next(reason for stage in self.stages for reason in stage.unknown)}"
        memory, download = in_bytes(self.peak_memory + self.libraries), f", of {self.download}" if self.download else ""
        return f"foretold: {time}, {memory} of memory, {in_bytes(self.disk)} on disk{download}"


@dataclass(frozen=True)
class _Done:
    """A part of the run with its work; `again` gives the work of the same part with other settings."""

    stage: str
    name: str
    part: Plugin
    work: Work
    again: Callable[[Any], Work]


def plan(recipe: Recipe, out: Path | None = None, rates: Mapping[Kind, float] | None = None) -> Plan:
    """Foretell a run on this machine. Rates that are not given are measured for two seconds.

    Raises `UserError` for a configuration that is not there.
    """
    from llmq import environment, processes
    from llmq.planning.rates import measure, seconds_of

    device = environment.prepare(recipe.device, recipe.seed, recipe.threads)
    sketches = [recipe.model.sketch()]
    brought = recipe.model.foresee_base()
    steps: list[_Done] = []
    for name, step in zip(recipe.stage_names[1:], recipe.steps, strict=True):
        before = sketches[-1]
        made, work = _unknown(before) if before.unknown else step.foresee(before)
        sketches.append(made)
        steps.append(_Done(name, step.word, step, work, _again(before)))
    measured = dict(_measured(recipe, sketches))
    base = next(iter(measured.values()))
    asked = {name: _asked(recipe, name, sketch, base) for name, sketch in measured.items()}
    done = [*steps, *(d for of_stage in asked.values() for d in of_stage)]
    works = [brought, *(step.work for step in steps)]
    kinds = {kind for work in [brought, *(d.work for d in done)] for kind in work.operations}
    known = rates if rates is not None else measure(kinds, device)
    told = []
    for name, sketch, work in zip(recipe.stage_names, sketches, works, strict=True):
        told.append(_foretold(name, sketch, work, asked.get(name, []), known))
    if size_of_file := recipe.model.file_bytes():
        told[0] = replace(told[0], bytes_on_disk=size_of_file)
    seconds = [s for t in told for s in (t.seconds_of_step, t.seconds_of_tasks)]
    download, size = _download(recipe, sketches[0])
    named = zip(recipe.stage_names[1:], sketches[1:], strict=True)
    left = [s for name, s in named if not (out and (out / name).is_dir())]  # a resumed run has the others
    disk = sum(s.on_disk for s in left) + max((d.work.disk for d in done), default=0) + size
    seconds.append(seconds_of(Work(seconds=AROUND), known))
    total = None if any(s is None for s in seconds) else sum(s for s in seconds if s is not None)
    peak = max(work.memory for work in [brought, *(d.work for d in done)])
    machine = {"memory": environment.free_memory(device), "disk": free_bytes(out or Path.cwd())}
    # Each process opens a whole model, sharded or not; of cards each has its own.
    sharers = processes.here() if device == "cpu" else 1
    libraries = 0 if device.startswith("cuda") else LIBRARIES
    misfits = (
        *_too_large(done, int(machine["memory"]), sharers, libraries),
        *_without_room(disk, int(machine["disk"])),
    )
    shown = {str(kind): rate for kind, rate in known.items()}
    sized = None if any(sketch.unknown for sketch in sketches) else (peak, disk)
    most, kept = sized or (None, None)
    return Plan(recipe.name, tuple(told), total, most, kept, download, size, machine, shown, misfits, libraries)


def _again(before: Sketch) -> Callable[[Any], Work]:
    """The work of a step that is like another with other settings."""

    def work(step: Any) -> Work:
        found: tuple[Sketch, Work] = step.foresee(before)
        return found[1]

    return work


def _unknown(before: Sketch) -> tuple[Sketch, Work]:
    return before, Work(unknown=before.unknown)


def _measured(recipe: Recipe, sketches: list[Sketch]) -> Iterator[tuple[str, Sketch]]:
    """The stages that are questioned, as `pipeline` chooses them."""
    named = [*zip(recipe.stage_names, sketches, strict=True)][recipe.baseline_stages[0] :]
    yield from named if recipe.stages == "all" else dict([named[0], named[-1]]).items()


def _asked(recipe: Recipe, stage: str, sketch: Sketch, base: Sketch) -> list[_Done]:
    def work(task: Any) -> Work:
        alone: Work = task.foresee(sketch)
        return alone if sketch is base or base.unknown else alone.plus(task.foresee_against(sketch, base))

    def done(name: str, task: Any) -> _Done:
        return _Done(stage, name, task, Work(unknown=sketch.unknown) if sketch.unknown else work(task), work)

    return [done(name, task) for name, task in reading.by_name(recipe.evaluate).items()]


def _foretold(name: str, sketch: Sketch, step: Work, asked: list[_Done], rates: Mapping[Kind, float]) -> Foretold:
    from llmq.planning.rates import seconds_of

    is_known = not sketch.unknown
    tasks = Work()
    for each in asked:
        tasks = tasks.plus(each.work)
    reasons = (sketch.unknown, sketch.not_in_order, step.unknown, tasks.unknown)

    def seconds(work: Work) -> float | None:
        spent = seconds_of(work, rates)
        return None if spent is None else round(spent, 2)

    return Foretold(
        name,
        sketch.parameters if is_known else None,
        sketch.on_disk if is_known else None,
        sketch.in_memory if is_known else None,
        step.memory or None,
        tasks.memory or None,
        seconds(step),
        seconds(tasks),
        {each.name: {"peak_memory": each.work.memory or None, "seconds": seconds(each.work)} for each in asked},
        tuple(dict.fromkeys(filter(None, reasons))),
    )


def _download(recipe: Recipe, base: Sketch) -> tuple[str, int]:
    """The repository of the hub that the base comes from, and the bytes that come, if they are not here."""
    name = recipe.model.download()
    return name, base.on_disk if name and not base.unknown else 0


def _too_large(done: list[_Done], whole: int, sharers: int, libraries: int) -> Iterator[Misfit]:
    """The parts for which the memory beside the libraries is too small: of each stage the step, and the largest task.

    `sharers` processes share the `whole` memory for what is done in every process.
    """
    worst: dict[tuple[str, bool], _Done] = {}
    for each in done:
        key = each.stage, each.name == each.part.word
        if key not in worst or each.work.needed > worst[key].work.needed:
            worst[key] = each
    for each in worst.values():
        there = whole // (sharers if getattr(each.part, "in_every_process", False) else 1)
        free = there - libraries
        if each.work.memory and each.work.needed > free:
            needed = each.work.needed + libraries
            yield Misfit(each.stage, each.part.word, "memory", needed, there, _cure(each, free, libraries))


def _without_room(disk: int, free: int) -> Iterator[Misfit]:
    if disk > free:
        yield Misfit("run", "all stages", "disk", disk, free, "make room, or name another folder with --out")


def _cure(done: _Done, free: int, libraries: int) -> str:
    """The nearest settings by which a part fits, or the memory that it needs at the least, libraries included."""
    least = done.work.needed
    for settings in done.part.smaller():
        needed = done.again(done.part.model_copy(update=dict(settings))).needed
        least = min(least, needed)
        if needed <= free:
            told = " ".join(f"{done.part.word.removeprefix('tasks.')}.{key}={value}" for key, value in settings.items())
            return f"it fits with {told} (about {in_bytes(needed + libraries)})"
    return f"no setting of it fits: take a smaller model, or a machine with {in_bytes(least + libraries)} free"


def before_run(recipe: Recipe, out: Path, force: bool) -> Plan | None:
    """Foretell how long a run will take and what it needs; None for a run that cannot be foretold.

    Raises `UserError` with the cure for a part that this machine has no room for, unless `force` goes on.
    """
    from llmq import processes
    from llmq.terminal import say

    if not processes.is_first():
        return None
    try:
        made = plan(recipe, out)
    except Exception as error:  # noqa: BLE001 - a network that runs may be one that cannot be foretold
        say(f"not foretold: {one_line(error)}")
        return None
    for misfit in made.misfits:
        if not force:
            raise UserError(f"{misfit}; --force goes on")
        say(f"will not fit: {misfit}")
    return made


def duration(seconds: float | None) -> str:
    """Seconds as people say them; `unknown` for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

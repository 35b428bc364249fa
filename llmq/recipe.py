"""YAML -> `Recipe`, every check done before anything runs; and the recipe of a run that exists."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, ValidationError

from llmq import overrides, plugin, reading, trackers
from llmq.errors import UserError, did_you_mean, explain
from llmq.files import at_home
from llmq.guarded.files import read_json_object
from llmq.rules import Rule, read_rule
from llmq.source import Place, Source, find, names, read, with_suite, word_at
from llmq.types import Data, JsonObject, Model, Plugin, Settings, Step, Task

if TYPE_CHECKING:
    from llmq.artifact import Artifact

__all__ = ["Recipe", "Source", "find", "names", "read"]
MOST = 500
"""The most steps, tasks or rules of one recipe."""
PATHS = ("path", "images", "held_out", "partner", "include_path", "data_dir", "inception", "weights", "data", "text")
"""Settings that can name a file or folder."""


class Recipe(Settings):
    """A whole job: a model, the steps that change it, the tasks that question every stage."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    model: Model
    steps: tuple[Step, ...] = ()
    evaluate: tuple[Task, ...] = ()
    seed: int = Field(0, ge=0, lt=2**32)  # numpy takes no other seed
    device: str = "auto"
    threads: PositiveInt | None = None
    stages: Literal["all", "ends"] = "all"
    baseline: str | None = None
    """The stage that all later ones are compared with, for a base that is a network yet to be trained.

    The word of the step, or, if that word stands twice, the name of the stage: `1-adapt.train`.
    """
    gate: tuple[str, ...] = ()
    """Rules on the figures of the last stage, such as `perplexity <= 1.03x base`."""
    track: tuple[trackers.Tracker, ...] = ()
    """Trackers of experiments that get the curves, the figures and the report when the run has ended."""

    @property
    def stage_names(self) -> list[str]:
        """The names of the stages: `0-base`, `1-quantize.bnb`, …"""
        return ["0-base", *(f"{i}-{step.word}" for i, step in enumerate(self.steps, 1))]

    @property
    def baseline_stages(self) -> list[int]:
        """The numbers of the stages that `baseline` can mean: one, in a recipe that was checked."""
        if self.baseline is None:
            return [0]
        return [i for i, name in enumerate(self.stage_names) if self.baseline in (name, name.partition("-")[2])]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of `gate`, parsed."""
        return tuple(map(read_rule, self.gate))

    def plain(self) -> JsonObject:
        """The recipe as YAML can hold it: the content of `recipe.yaml` in the run folder."""

        plain = {
            "model": plugin.entry(self.model),
            "steps": [plugin.entry(s, whole=True) for s in self.steps],
            "evaluate": [plugin.entry(t) for t in self.evaluate],
        }
        others = {f: getattr(self, f) for f in ("seed", "device", "threads", "stages", "baseline", "gate", "track")}
        return plain | {k: v for k, v in others.items() if k == "seed" or v != type(self).model_fields[k].default}


def load(name: str, changes: Iterable[str] = (), *, checked: bool = True) -> Recipe:
    """The recipe in a file, or of that name among the bundled ones, with `word.key=value` overrides folded in.

    Unless `checked`, weights and data may be missing.
    """
    path = find("recipes", name)
    return of_source(read(path), path.stem, changes, checked=checked)


def of_source(source: Source, name: str, changes: Iterable[str] = (), *, checked: bool = True) -> Recipe:
    """The recipe in a source, called `name`, with `word.key=value` overrides folded in."""
    check_shape(source)
    for override in overrides.in_order(changes):
        apply_override(source, override)
    return parse(source, name) if checked else built(source, name)


def apply_override(source: Source, override: str) -> None:
    """Fold `adapt.lora.r=32`, `perplexity.limit=32`, `model.weights=org/name` or `seed=1` into the data."""
    overrides.fold(source, override, Recipe.model_fields)


def check_shape(source: Source) -> None:
    """Raise `UserError` unless the data is a mapping of known keys, with a list of steps."""
    data = source.data
    if not isinstance(data, dict):
        raise UserError(f"{source.name}: a recipe is a mapping with 'model', 'steps' and 'evaluate'")
    for key in data:
        if key not in Recipe.model_fields or key == "name":
            known = set(Recipe.model_fields) - {"name"}
            raise UserError(f"{source.where((key,))}: unknown key {key!r}{did_you_mean(key, known)}")
    if not isinstance(data.get("steps") or [], list):
        raise UserError(f"{source.where(('steps',))}: 'steps' is a list; begin each with '- '")
    for key in ("steps", "evaluate", "gate"):
        if isinstance(data.get(key), list) and len(data[key]) > MOST:
            raise UserError(f"{source.where((key,))}: {key!r} has {len(data[key])} entries; {MOST} at most")


def parse(source: Source, name: str) -> Recipe:
    """Check everything and build the plug-ins. Raises `UserError` with the place and the cure."""
    recipe = built(source, name)
    trackers.check(recipe.track)
    check_part(recipe.model, source, ("model", recipe.model.word.removeprefix("models.")))
    try:
        for i, step in enumerate(recipe.steps):
            check_part(step, source, ("steps", i, step.word))
            _check_teacher(step, recipe.stage_names[: i + 1], source, ("steps", i, step.word))
        _check_tasks(recipe.evaluate, source)
    except UserError as error:
        raise UserError(f"{error}{lost(of_weights(recipe.model))}") from None
    return recipe


def _check_teacher(step: Step, before: Sequence[str], source: Source, place: Place) -> None:
    """Raise `UserError` for a teacher that is neither the base, nor a stage before the step, nor a stage's folder."""
    teacher = getattr(step, "teacher", None)
    if teacher is None or teacher == "base" or teacher in before or (at_home(teacher) / "artifact.json").is_file():
        return
    raise UserError(
        f"{source.where((*place, 'teacher'))}: teacher {teacher!r} is neither base, nor a stage before this step "
        f"({', '.join(before)}), nor a stage's folder{did_you_mean(teacher, before)}"
    )


def built(source: Source, name: str) -> Recipe:
    """The recipe, checked for words that fit one another; weights and data may be missing."""
    check_shape(source)
    with_suite(source)
    data = source.data
    if not data.get("model"):
        raise UserError(f"{source.name}: a recipe needs a 'model', such as 'causal_lm: {{weights: smollm2-135m}}'")
    steps = data.get("steps") or []
    model = part(source, ("model",), data["model"], "models")
    made = [part(source, ("steps", i), s, None, model.kind) for i, s in enumerate(steps)]
    for i, step in enumerate(made):
        if not isinstance(step, Step):
            raise UserError(f"{source.where(('steps', i))}: {step.word!r} is not a step")
    before = of_weights(model)
    made_by = before.steps if before else ()
    own = reading.with_own_data(made, model.kind, made_by)
    # Tasks read newly trained data; without training each reads the data of the task of the same name before.
    asked = before.evaluate if before and not any(step.uses == "training" for step in own) else ()
    tasks = _tasks(source, model.kind, (*made_by, *own), asked)
    parts = {"name": name, "model": model, "steps": own, "evaluate": tasks}
    others = {k: v for k, v in data.items() if k not in parts}
    recipe: Recipe = _validated(lambda: Recipe(**parts, **others), source, (), None, {})
    check_order(recipe.model.kind, recipe.steps, source, begins_in=recipe.model.begins_in)
    if len(recipe.baseline_stages) != 1:
        raise UserError(
            f"{source.where(('baseline',))}: baseline {recipe.baseline!r} is not one stage of this recipe"
            f"{did_you_mean(str(recipe.baseline), recipe.stage_names)}"
        )
    _check_gate(recipe, source)
    return recipe


def _check_gate(recipe: Recipe, source: Source) -> None:
    for i, rule in enumerate(recipe.gate):
        try:
            read_rule(rule)
        except UserError as error:
            raise UserError(f"{source.where(('gate', i))}: {error}") from None
    if recipe.gate and not recipe.evaluate:
        raise UserError(f"{source.where(('gate',))}: a gate judges measurements; name tasks under 'evaluate'")


def suite_tasks(
    suite: Any, source: Source, kind: str, steps: Sequence[Step] = (), asked: Sequence[Task] = ()
) -> tuple[Task, ...]:
    """The tasks of a named suite or an inline list, each checked; see `_tasks`."""
    source = Source(source.name, {"evaluate": suite}, dict(source.lines), dict(source.files))
    with_suite(source)
    tasks = _tasks(source, kind, steps, asked)
    _check_tasks(tasks, source)
    return tasks


def _tasks(source: Source, kind: str, steps: Sequence[Step], asked: Sequence[Task] = ()) -> tuple[Task, ...]:
    """The tasks that a recipe lists, with the data of `steps`, or that of the tasks `asked` before.

    Raises `UserError` if one does not suit the kind of model.
    """
    entries, place = source.data.get("evaluate") or [], ("evaluate",)
    if not isinstance(entries, list):
        raise UserError(f"{source.where(place)}: 'evaluate' is the name of a suite or a list of tasks")
    made = [part(source, (*place, i), entry, "tasks", kind) for i, entry in enumerate(entries)]
    tasks = reading.with_data_of(made, kind, steps, asked)
    for i, task in enumerate(tasks):
        _suits(task, kind, source, (*place, i, task.word.removeprefix("tasks.")))
    return tuple(tasks)


def _check_tasks(tasks: Iterable[Task], source: Source) -> None:
    for i, task in enumerate(tasks):
        check_part(task, source, ("evaluate", i, task.word.removeprefix("tasks.")))


def check_part(part: Plugin, source: Source, place: Place) -> None:
    """Check a plug-in, and the plug-ins among its settings. Raises `UserError` with the place."""
    try:
        part.check()
    except UserError as error:
        told = next((at for at in source.overridden(place) if str(source.at(at)) in str(error)), place)
        raise UserError(f"{source.where(told)}: {error}") from None


def part(source: Source, place: Place, value: Any, package: str | None, kind: str | None = None) -> Any:
    word, settings = word_at(source, place, value)
    try:
        cls = plugin.load(f"{package}.{word}" if package else word)
    except UserError as error:
        raise UserError(f"{source.where(place)}: {_strip(str(error), package)}") from None
    return _validated(
        lambda: cls.model_validate(settings, context={"kind": kind}), source, (*place, word), cls, settings
    )


def _strip(message: str, package: str | None) -> str:
    """A message on words without the package that their place implies."""
    return message.replace(f"'{package}.", "'") if package else message


def _validated(
    build: Callable[[], Any], source: Source, place: Place, cls: type[Plugin] | None, settings: JsonObject
) -> Any:
    try:
        return build()
    except ValidationError as error:
        # A misspelt key often leaves another one missing; the error is about the misspelt one.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = errors[0]["loc"][:1]
        same = [e for e in errors if e["loc"][:1] == key]
        if found := _innermost(settings, same[0]["loc"]):
            depth, within, inner = found
            place, cls = (*place, *within), plugin.load(f"data.{inner}")
            same = [
                {**e, "loc": e["loc"][depth:]} for e in same if e["loc"][: depth + 1] == same[0]["loc"][: depth + 1]
            ]
        raise UserError(f"{source.where((*place, *same[0]['loc']))}: {explain(same, cls)}") from None


def _innermost(settings: Any, loc: Place) -> tuple[int, Place, str] | None:
    """The innermost data whose settings `loc` leads into, or None.

    `loc`, as pydantic gives it, leaves out the words of plug-ins: `("data", "pth")` in `data: {file: {pth: …}}`.
    Returns the number of keys in `loc` that lead to the data, the whole place of the data's settings, and the word.
    """
    found: tuple[int, Place, str] | None = None
    place: Place = ()
    value = settings
    for depth, key in enumerate(loc[:-1], 1):
        try:
            value, place = value[key], (*place, key)
        except (KeyError, IndexError, TypeError):  # pydantic's name for one of several alternatives
            return found
        word = str(next(iter(value))) if isinstance(value, dict) and len(value) == 1 else ""
        if word != loc[depth] and f"data.{word}" in plugin.words():
            value, place = value[word], (*place, word)
            found = depth, place, word
    return found


def _suits(part: Step | Task, kind: str, source: Source, place: Place) -> None:
    takes = part.shapes if isinstance(part, Task) else frozenset()
    for at, asked in (((), part), *part.parts()):
        if isinstance(asked, Data) and takes and asked.shapes and not takes & asked.shapes:
            wanted, has = (" or ".join(sorted(shapes)) for shapes in (takes, asked.shapes))
            raise UserError(f"{source.where((*place, *at))}: {part.word!r} reads {wanted}, and {asked.word!r} is {has}")
        if isinstance(asked, Step | Task | Data) and kind not in asked.suits:
            suited, where = ", ".join(sorted(asked.suits)), source.where((*place, *at))
            raise UserError(f"{where}: {asked.word!r} suits {suited}, and this model is a {kind}")


CURES = {
    ("packed", True): "needs packed weights; put a quantization before it",
    ("packed", False): "needs float weights, and these are packed already; put it first, or name a float model",
    ("adapter", True): "needs an adapter; put adapt.lora before it",
    ("adapter", False): "cannot stand on an adapter; put adapt.merge before it",
}


def check_order(
    kind: str, steps: Iterable[Step], source: Source, base: "Artifact[Any] | None" = None, begins_in: str = "torch"
) -> None:
    """Check that each step finds the state that it requires. Raises `UserError` at the first that does not.

    Without a `base` the first step is taken to find float weights without an adapter, in the runtime `begins_in`.
    """
    now: dict[str, bool | str] = {"packed": False, "adapter": False, "runtime": begins_in}
    if base:
        now = {"packed": base.packed, "adapter": base.adapter is not None, "runtime": base.runtime}
    before: list[Step] = []
    for i, step in enumerate(steps):
        where = source.where(("steps", i))
        _suits(step, kind, source, ("steps", i, step.word))
        for name, wanted in step.requires.items():
            if now[name] != wanted:
                raise UserError(f"{where}: {step.word!r} {CURES[name, wanted]}")
        if now["runtime"] not in step.runtimes:
            raise UserError(f"{where}: {step.word!r} needs a stage in torch, and this one is in {now['runtime']}")
        try:
            step.check_after(before)
        except UserError as error:
            raise UserError(f"{where}: {step.word!r} {error}") from None
        now.update(step.left)
        before.append(step)


def is_run(folder: Path) -> bool:
    """True for the folder of a run; a `recipe.yaml` beside a model's configuration is that of another tool."""
    return (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file()


def of_run(target: str) -> Recipe | None:
    """The recipe of the run that `target` is, or is a stage of; None for any other target.

    Relative paths in the recipe start from the folder that the run was called in, which the report keeps.
    """
    folder = Path(target)
    is_stage = (folder / "artifact.json").is_file()
    home = folder.resolve().parent if is_stage else folder
    if not (is_run(folder) or (is_stage and (home / "recipe.yaml").is_file())):
        return None
    source = read(home / "recipe.yaml")
    source.data = _settled(source.data, _called_from(home))
    return built(source, home.name)


def of_weights(model: Model) -> Recipe | None:
    """The recipe of the run whose stage a model's weights are."""
    weights = str(getattr(model, "weights", None) or "")
    folder = at_home(weights)
    return of_run(str(folder)) if weights and (folder / "artifact.json").is_file() else None


def lost(job: Recipe | None) -> str:
    """The end of an error message where data that the run read is gone: the cure."""
    read = [data for part in (*job.steps, *job.evaluate) for data in reading.data_of(part)] if job else []
    gone = [reading.called(data) for data in read if not reading.is_here(data)]
    cure = "call it from where that lies, or name other data, such as perplexity.data=pydoc"
    return f"; the run read {gone[0]}: {cure}" if gone else ""


def _called_from(home: Path) -> list[Path]:
    """The folder that a run was called in: the path of then, and the path now if folder and run were moved together."""
    try:
        about = read_json_object(home / "report.json")["environment"]
        folder, run = str(about["called_from"]), str(about["run"])
    except (UserError, KeyError, TypeError):  # an older report, or a damaged one
        return []
    return [Path(folder), Path(os.path.normpath(home.resolve() / os.path.relpath(folder, run)))]


def _settled(value: object, folders: Sequence[Path], key: str = "") -> object:
    """Plain data with each relative path to what lies in one of the folders made absolute."""
    if isinstance(value, dict):
        return {k: _settled(v, folders, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_settled(v, folders, key) for v in value]
    if not (isinstance(value, str) and value and key in PATHS) or f"data.{value}" in plugin.words():
        return value
    there = Path.is_file if key == "held_out" else Path.exists  # or the word `test` would mean a folder of that name
    return next((str(folder / value) for folder in folders if there(folder / value)), value)

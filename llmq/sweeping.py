"""Many runs of one recipe under other settings: a grid, a list or a search, one process a run.

Finished runs are skipped, failed ones tried again once; on a Ray cluster several run at once. Runs that begin with the
same base and steps make those stages once: the stages of a finished run are linked into the folder of the next one,
which resumes after them.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from llmq import answers, environment, partials, processes, reading, trust, types
from llmq import recipe as recipes
from llmq.artifact import MACHINE
from llmq.errors import LlmqError, UserError, explain
from llmq.files import CARD, at_home, sha256_text, write_json, write_text
from llmq.guarded.files import read_json_object
from llmq.rules import Rule, read_rule
from llmq.runs import folder as run_folder
from llmq.source import find, read, to_flow, to_yaml
from llmq.terminal import say
from llmq.types import JsonObject, Measurement

if TYPE_CHECKING:
    import optuna

    from llmq.recipe import Recipe

Settings = Mapping[str, Any]
"""Overrides of a recipe: `{"adapt.lora.r": 32}`."""
RunIn = Callable[["Point"], int]
"""Runs a point in its folder; returns the exit code of `llmq run`."""
DONE = (0, 1, 3)
"""The exit codes of a run that ended: its gate passed, failed, or is undecided."""
TOLD, PAGE, KNEE = "sweep.json", "compare.html", "knee.svg"
ANSWERS = ("measurements.json", "clocks.json", "samples", "pictures", "lm_eval", CARD)
"""What tasks leave in a stage: another run may ask other tasks, and the cache knows answers to the same ones."""


class Range(types.Settings):
    """The numbers between which a search looks: whole ones between whole numbers."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low}, high {self.high}: low is at most high, and above 0 with log")
        return self


class Sweep(types.Settings):
    """A sweep as its YAML says it: one of `grid`, `list` and `search`."""

    recipe: str | dict[str, Any]
    """A bundled recipe, a file, or the recipe itself."""
    name: str = ""
    """The name in the picture; that of the recipe, or of the file of a sweep that has its recipe in it, if unset."""
    overrides: dict[str, object] = {}
    """Settings of every run."""
    grid: dict[str, list[object]] = {}
    list: tuple[dict[str, object], ...] = ()
    search: dict[str, Range | Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """What Optuna's TPE may choose: one of some values, or a number of a range."""
    trials: PositiveInt = 20
    objectives: tuple[str, ...] = Field(("token_perplexity", "bytes_on_disk"), min_length=1)
    """Figures of the last stage; their directions are those of the figures."""
    gate: tuple[str, ...] = ()
    """Rules on the last stage; the best run is the first by the first objective among those that pass."""
    seed: int = Field(0, ge=0, lt=2**32)


@dataclass
class Point:
    """One run of a sweep."""

    name: str
    settings: Settings
    recipe: "Recipe"
    folder: Path
    code: int | None = None
    """The exit code of its run; None before."""
    tries: int = 0
    shared: tuple[str, ...] = ()
    """The stages that another run of the sweep had made."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The objectives, by name."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Their 95 % intervals, where the samples tell one."""
    base: Mapping[str, float] = field(default_factory=dict)
    """The same figures of the stage that the others of the run are compared with."""
    losses: Sequence[float] = ()
    """The same figures, with those turned round that are better when higher."""
    measured: Sequence[Measurement] = ()
    """The objectives with their protocols."""
    unlike: str = ""
    """The reason why its objectives cannot be ranked beside those of the first run."""
    hashes: Sequence[str] = ()
    """The beginnings of the recipe, once they were looked at."""
    gate: str = ""
    """The verdict on the rules of the sweep."""

    @property
    def done(self) -> bool:
        """True if the run ended."""
        return self.code in DONE

    def plain(self) -> JsonObject:
        """The point as JSON holds it."""
        told = {k: v for k, v in asdict(self).items() if k not in ("recipe", "folder", "losses", "measured", "hashes")}
        return {**told, "folder": self.folder.name, "settings": dict(self.settings)}


@dataclass(frozen=True)
class Swept:
    """A sweep at its end."""

    folder: Path
    points: Sequence[Point]
    front: Sequence[str]
    """The runs that no other run beats in one objective without losing in another."""
    best: str | None
    """The best run by the first objective, of those that pass the gate."""

    @property
    def failed(self) -> Sequence[Point]:
        """The runs that failed, twice each."""
        return [point for point in self.points if not point.done]

    def plain(self) -> JsonObject:
        """The sweep as JSON holds it."""
        runs = [point.plain() for point in self.points]
        return {"folder": str(self.folder), "runs": runs, "front": list(self.front), "best": self.best}


def load(name: str | Path) -> Sweep:
    """The sweep in a YAML file, or a bundled one. Raises `UserError` with the place and the cure."""
    file = find("sweeps", str(name))
    source = read(file)
    try:
        sweep = Sweep.model_validate(source.data if isinstance(source.data, dict) else {})
    except ValidationError as error:
        first = error.errors()[0]["loc"][:1]
        same = [e for e in error.errors() if e["loc"][:1] == first]
        raise UserError(f"{source.where(first)}: {explain(same, Sweep)}") from None
    if sum(map(bool, (sweep.grid, sweep.list, sweep.search))) != 1:
        raise UserError(f"{source.name}: a sweep has one of 'grid', 'list' and 'search'")
    for rule in sweep.gate:
        read_rule(rule)
    if not isinstance(sweep.recipe, str):
        return sweep.model_copy(update={"name": sweep.name or file.stem})
    beside = file.parent / sweep.recipe  # a path starts at the sweep's own folder
    return sweep.model_copy(update={"recipe": str(beside)}) if beside.is_file() else sweep


def sweep(asked: Sweep, out: Path, run_in: RunIn | None = None, at_once: int = 1) -> Swept:
    """Run every point of a sweep in a folder of `out`, and write the table after each. Raises `UserError` first.

    `run_in` runs a point; a process of its own if unset, so that a run killed for its memory ends no other. `at_once`
    points of a grid or a list run side by side; a search chooses each by the ones before.
    """
    points = [_point(asked, settings, out) for settings in settings_of(asked)]
    if len({point.name for point in points}) < len(points):
        raise UserError("two runs of this sweep have the same settings; name each once")
    if not (points or asked.search):
        raise UserError("this sweep has no runs; give each setting of its grid a value")
    with run_folder.held(run_folder.no_file(out)):
        _check_recipe(asked, out)
        way = run_in or in_a_process
        done: list[Point] = []
        ended = _searched(asked, out, done, way) if asked.search else _ended(points, way, at_once)
        for point in ended:
            done.append(point)
            if point.done:
                _judge(asked, point)
            swept = _write(asked, out, [p for p in points if p in done] if points else done)
    return swept


def on_cluster(asked: Sweep, out: Path, address: str) -> Swept:
    """Run every point of a sweep on a Ray cluster. Raises `UserError` where none answers."""
    from llmq import cluster

    with cluster.joined(address) as joined:
        return sweep(asked, out.absolute(), lambda p: joined.run(_words(p), _log(p), p.recipe), joined.at_once)


def _ended(points: Sequence[Point], run_in: RunIn, at_once: int) -> Iterator[Point]:
    """The points in the order in which they end, at most `at_once` of them under way."""
    waiting, done = list(points), list[Point]()
    if at_once == 1:
        for point in waiting:
            _run(point, done, run_in)
            done.append(point)
            yield point
        return
    with ThreadPoolExecutor(at_once) as pool:
        running: dict[Future[None], Point] = {}
        while waiting or running:
            for point in list(waiting):
                if len(running) < at_once and not any(_makes_for(other, point) for other in running.values()):
                    waiting.remove(point)
                    running[pool.submit(_run, point, list(done), run_in)] = point
            first, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in first:
                point = running.pop(future)
                future.result()
                done.append(point)
                yield point


def _makes_for(running: Point, waiting: Point) -> bool:
    """True if a run makes stages that another one begins with, which is then given them."""
    for point in (running, waiting):
        point.hashes = point.hashes or beginnings(point.recipe)
    return _same(running, waiting) > 1 and not finished(waiting)


def settings_of(asked: Sweep) -> Iterator[Settings]:
    """The settings of each run of a grid or a list, those for every run with them."""
    if asked.grid:
        for values in product(*asked.grid.values()):
            yield {**asked.overrides, **dict(zip(asked.grid, values, strict=True))}
    for entry in asked.list:
        yield {**asked.overrides, **entry}


def recipe_of(asked: Sweep, settings: Settings, *, checked: bool = True) -> "Recipe":
    """The recipe of a sweep under some settings. Raises `UserError` for settings that it does not take."""
    from llmq.overrides import in_order

    if isinstance(asked.recipe, str):
        return recipes.load(asked.recipe, in_order(settings), checked=checked)
    source = recipes.Source(f"the recipe of {asked.name}", deepcopy(asked.recipe))
    return recipes.of_source(source, asked.name, in_order(settings), checked=checked)


def _point(asked: Sweep, settings: Settings, out: Path) -> Point:
    """The run of some settings."""
    name = name_of({k: v for k, v in settings.items() if asked.overrides.get(k) != v})
    return Point(name, settings, recipe_of(asked, settings), out / name)


def name_of(settings: Settings) -> str:
    """The name of a run: the last part of each key with the value, and a hash that tells runs of one name apart."""
    parts = (f"{key.rpartition('.')[2]}-{to_flow(value)}" for key, value in settings.items())
    told = re.sub(r"[^\w.-]+", "-", "_".join(parts)).strip("-.")[:60]
    return f"{told or 'run'}-{sha256_text(json.dumps(dict(settings), sort_keys=True, default=str))[:6]}"


def _check_recipe(asked: Sweep, out: Path) -> None:
    """Raise `UserError` where `out` holds the runs of another sweep."""
    kept = out / TOLD
    told = read_json_object(kept).get("sweep") if kept.is_file() else {"recipe": asked.recipe}
    if not isinstance(told, dict) or told.get("recipe") != asked.recipe:
        raise UserError(f"{str(kept)!r} is of another sweep; use a new --out")


def _searched(asked: Sweep, out: Path, done: Sequence[Point], run_in: RunIn) -> Iterator[Point]:
    """The runs that Optuna's TPE chooses, each told of before the next; the same seed chooses the same again."""
    try:
        import optuna
    except ImportError:
        raise UserError("a search needs Optuna: pip install optuna; a grid and a list need nothing") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=asked.seed)
    study = optuna.create_study(directions=["minimize"] * len(asked.objectives), sampler=sampler)
    known: dict[str, Point] = {}
    for _ in range(asked.trials):
        trial = study.ask()
        settings = {**asked.overrides, **{key: _chosen(trial, key, space) for key, space in asked.search.items()}}
        point = _point(asked, settings, out)
        if point.name not in known:  # few values to choose among are chosen twice
            known[point.name] = point
            _run(point, done, run_in)
            yield point
        point = known[point.name]
        ranked = point.done and not point.unlike
        failed = None if ranked else optuna.trial.TrialState.FAIL
        study.tell(trial, list(point.losses) if ranked else None, state=failed)


def _chosen(trial: "optuna.Trial", key: str, space: Range | tuple[object, ...]) -> object:
    if not isinstance(space, Range):
        return trial.suggest_categorical(key, list(space))
    whole = isinstance(space.low, int) and isinstance(space.high, int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(key, *map(int if whole else float, (space.low, space.high)), log=space.log)


def _run(point: Point, points: Sequence[Point], run_in: RunIn) -> None:
    """Run a point unless it is finished, and once more if it fails by something else than its input."""
    if finished(point):
        point.code = 0
        say(f"{point.name}: finished already")
        return
    if not (point.folder / "recipe.yaml").is_file():
        point.shared = share_beginning(
            point, [p for p in points if p is not point and p.done and (p.folder / "0-base").is_dir()]
        )
    for point.tries in (1, 2):
        again = " once more" if point.tries == 2 else ""
        beside = f", after {point.shared[-1]} of another run" if point.shared and not again else ""
        say(f"{point.name}: runs{again}{beside}")
        point.code = run_in(point)
        if point.done or point.code in (2, 130, 143):  # wrong input stays wrong
            break
    if point.code in (130, 143, -2, -15):
        raise LlmqError(f"{point.name} was stopped; the same command goes on")


def finished(point: Point) -> bool:
    """True if the run of a point ended before, and nothing in it failed.

    Raises `UserError` for a run, ended or not, of another recipe, or by other data, weights, code or libraries.
    """
    report, kept = point.folder / "report.json", point.folder / "recipe.yaml"
    if not kept.is_file():
        return False
    same = read(kept).data == json.loads(json.dumps(point.recipe.plain(), default=str))
    if not same:
        raise UserError(f"{str(kept)!r} holds another recipe; the recipe of the sweep has changed: use a new --out")
    before, now = _kept(point, "made_by"), json.loads(json.dumps(made_by(point.recipe), default=str))
    if changed := [name for name in now if not isinstance(before, dict) or before.get(name) != now[name]]:
        raise UserError(
            f"{str(point.folder)!r} was made by other {', '.join(changed)} than there is now; use a new --out, or "
            "remove the folder to make its run again"
        )
    return report.is_file() and not read_json_object(report).get("failures")


def in_a_process(point: Point) -> int:
    """Run a point in a process of its own; returns the exit code, or the negative number of a signal."""
    words = [sys.executable, "-m", "llmq", *_words(point)]
    with _log(point).open("a", encoding="utf-8") as log:
        ended = subprocess.run(
            words, stdout=log, stderr=subprocess.STDOUT, check=False, preexec_fn=processes.end_with_parent
        )
    return ended.returncode


def _words(point: Point) -> list[str]:
    """The words that make `llmq` run a point, whose folder and recipe are written."""
    file = point.folder.with_name(f"{point.folder.name}.yaml")
    write_text(file, to_yaml(point.recipe.plain()))
    point.folder.mkdir(exist_ok=True)
    trusted = ["--trust-remote-code"] if trust.remote_code() else []
    return ["run", str(file), "--out", str(point.folder), "--resume", *trusted]


def _log(point: Point) -> Path:
    return point.folder.with_name(f"{point.folder.name}.log")


def made_by(recipe: "Recipe") -> JsonObject:
    """What decides the figures of a run besides its recipe, by the words for it."""
    return {
        "weights": _stamp(str(getattr(recipe.model, "weights", ""))),
        "data": reading.hashes([*recipe.steps, *recipe.evaluate]),
        "libraries": {name: environment.library_version(name) for name in environment.LIBRARIES},
        "code of llmq": answers.own_code(),
        "trust": trust.told(),
    }


def beginnings(recipe: "Recipe") -> list[str]:
    """A hash for each stage, of everything that decides its files: weights, steps, data, code, libraries, seed."""
    fixed = {
        "model": answers.settings(recipe.model),
        "weights": _stamp(str(getattr(recipe.model, "weights", ""))),
        "run": [recipe.seed, recipe.device, recipe.threads],
        "libraries": {name: environment.library_version(name) for name in environment.LIBRARIES},
        "llmq": answers.own_code(),
        "trusted": trust.told(),
    }
    made = []
    for count in range(len(recipe.steps) + 1):
        steps = recipe.steps[:count]
        data = reading.hashes(steps)
        told = {**fixed, "steps": [answers.settings(step) for step in steps], "data": data}
        made.append(sha256_text(json.dumps(told, sort_keys=True, default=str)))
    return made


def _stamp(weights: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of weights that lie here; of a hub id nothing, as its cache is not changed."""
    place = at_home(weights)
    files = sorted(place.glob("*")) if weights and place.is_dir() else [place] if place.is_file() else []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def share_beginning(point: Point, others: Sequence[Point]) -> tuple[str, ...]:
    """Link the stages that another run made by the same beginning into the folder of a new one; their names.

    A run keeps the beginnings that it had when it began: its data or llmq may have changed since.
    """
    point.hashes = beginnings(point.recipe)
    write_json(_beginnings_file(point), {"beginnings": point.hashes, "made_by": made_by(point.recipe)})
    for each in others:
        kept = _kept(each, "beginnings")
        each.hashes = each.hashes or (kept if isinstance(kept, list) else ())
    best = max(others, key=partial(_same, point), default=None)
    if best is None or _same(point, best) < 2:  # a base alone is brought as quickly
        return ()
    names = point.recipe.stage_names[: _same(point, best)]
    point.folder.mkdir(exist_ok=True)
    write_text(point.folder / "recipe.yaml", to_yaml(point.recipe.plain()))  # first: a killed sweep goes on from there
    for name in names:
        _link(best.folder / name, point.folder / name)
    return tuple(names)


def _beginnings_file(point: Point) -> Path:
    return point.folder.with_name(f"{point.name}.json")


def _kept(point: Point, what: str) -> object:
    """What was noted of a point when it began; None if nothing was."""
    file = _beginnings_file(point)
    return read_json_object(file).get(what) if file.is_file() else None


def _same(one: Point, other: Point) -> int:
    """The number of stages that two runs have in common; a hash is of all steps before, so that they come first."""
    return sum(a == b for a, b in zip(one.hashes, other.hashes, strict=False))


def _link(source: Path, target: Path) -> None:
    """Make a stage of the files of another without a second copy of the weights, and without its answers."""

    def unasked(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in ANSWERS and Path(folder) == source]

    with partials.partial_of(target, folder=True) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, ignore=unasked, dirs_exist_ok=True)
        if (file := partial / MACHINE).is_file():
            told = read_json_object(file)
            file.unlink()  # or the file of the other run would change
            write_json(file, {k: v for k, v in told.items() if k != "asked"})


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _judge(asked: Sweep, point: Point) -> None:
    """Note the objectives of a run that ended, and the verdict on the rules of the sweep.

    Raises `UserError` for an objective that its last stage does not have.
    """
    from llmq.judge import gate, results

    first, *_, last = 2 * [*results.run(point.folder).values()]  # a stage alone is both
    found = [gate.resolve(Rule(name, name, True, False), last.measurements) for name in asked.objectives]
    point.figures = {name: m.value for name, m in zip(asked.objectives, found, strict=True)}
    point.measured = found
    same = {(m.task, m.metric): name for name, m in zip(asked.objectives, found, strict=True)}
    point.base = {same[key]: m.value for m in first.measurements if (key := (m.task, m.metric)) in same}
    known = {name: _interval(m) for name, m in zip(asked.objectives, found, strict=True)}
    point.intervals = {name: interval for name, interval in known.items() if interval}
    point.losses = [m.value if m.better == "lower" else -m.value for m in found]
    point.gate = gate.overall(gate.of_run(str(point.folder), asked.gate)) if asked.gate else ""


def _interval(m: Measurement) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None for one that was counted, or whose scatter is unknown."""
    from llmq.statistics.estimates import alone, by_stderr

    found = None if m.exact else alone(m.samples) if m.samples else by_stderr(m)
    return found.interval if found else None


def front(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """The names whose figures, all better when lower, no other row beats in one and equals or beats in the rest."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [name for name, mine in rows.items() if not any(beats(other, mine) for other in rows.values())]


def _write(asked: Sweep, out: Path, points: Sequence[Point]) -> Swept:
    """Write the table of the runs so far, and their comparison as a page; figures of unlike protocols have no rank."""
    from llmq.judge import protocols

    done = [point for point in points if point.done]
    for point in done:
        point.unlike = next(filter(None, map(protocols.unlike, point.measured, done[0].measured)), "")
    rows = {point.name: point.losses for point in done if not point.unlike}
    passing = [p.name for p in done if p.gate in ("", "pass") and not p.unlike]
    best = min(passing, key=lambda name: tuple(rows[name]), default=None)
    swept = Swept(out, list(points), front(rows), best)
    write_json(out / TOLD, {"sweep": asked.model_dump(mode="json"), **swept.plain()})
    if len(done) > 1:
        _draw(done, out)
        _draw_knee(asked, done, out)
    return swept


def _draw_knee(asked: Sweep, done: Sequence[Point], out: Path) -> None:
    """Draw each objective over the setting of a grid that has one setting, of numbers."""
    from llmq.report import knee

    setting, values = next(iter(asked.grid.items()), ("", []))
    if len(asked.grid) != 1 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return
    name = asked.name or done[0].recipe.name
    bases = [point.base for point in done if not point.unlike]
    same = {each: base for each, base in bases[0].items() if all(other.get(each) == base for other in bases)}

    units = {each: m.unit for each, m in zip(asked.objectives, done[0].measured, strict=False)}

    def curve(objective: str) -> knee.Curve:
        return {
            float(p.settings[setting]): (p.figures[objective], p.intervals.get(objective))
            for p in done
            if objective in p.figures and not p.unlike
        }

    panels = [
        knee.Panel(f"{name}: {each}", setting, curve(each), same.get(each), units.get(each, ""))
        for each in asked.objectives
    ]
    write_text(out / KNEE, knee.draw(panels))


def _draw(done: Sequence[Point], out: Path) -> None:
    from llmq.judge import comparisons
    from llmq.report.html import draw_comparison

    try:
        found = comparisons.side_by_side(comparisons.targets([str(point.folder) for point in done]))
    except UserError as error:  # runs that share no figure have no page
        say(f"no page: {error}")
        return
    write_text(out / PAGE, draw_comparison(found))

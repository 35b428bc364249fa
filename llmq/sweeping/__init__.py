"""Many runs of one recipe under other settings: a grid, a list or a search, one process a run.

Finished runs are skipped, failed ones tried again once; on a Ray cluster several run at once. Runs that begin with the
same base and steps make those stages once: the stages of a finished run are linked into the folder of the next one,
which resumes after them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from llmq import processes, trust
from llmq.errors import LlmqError, UserError
from llmq.files import write_text
from llmq.guarded.files import read_json_object
from llmq.runs import folder as run_folder
from llmq.source import read, to_yaml
from llmq.sweeping import results, sharing
from llmq.sweeping.points import Point, Settings, Swept
from llmq.sweeping.spec import Range, Sweep, name_of, recipe_of, settings_of
from llmq.terminal import say

if TYPE_CHECKING:
    import optuna


RunIn = Callable[["Point"], int]
"""Runs a point in its folder; returns the exit code of `llmq run`."""


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
                results.judge(asked, point)
            swept = results.write(asked, out, [p for p in points if p in done] if points else done)
    return swept


def on_cluster(asked: Sweep, out: Path, address: str) -> Swept:
    """Run every point of a sweep on a Ray cluster. Raises `UserError` where none answers."""
    from llmq.sweeping import cluster

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
        point.hashes = point.hashes or sharing.beginnings(point.recipe)
    return sharing.common(running, waiting) > 1 and not finished(waiting)


def _point(asked: Sweep, settings: Settings, out: Path) -> Point:
    """The run of some settings."""
    name = name_of({k: v for k, v in settings.items() if asked.overrides.get(k) != v})
    return Point(name, settings, recipe_of(asked, settings), out / name)


def _check_recipe(asked: Sweep, out: Path) -> None:
    """Raise `UserError` where `out` holds the runs of another sweep."""
    kept = out / results.FILE
    before = read_json_object(kept).get("sweep") if kept.is_file() else {"recipe": asked.recipe}
    if not isinstance(before, dict) or before.get("recipe") != asked.recipe:
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
        point.shared = sharing.share_beginning(
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
    before, now = sharing.kept(point, "made_by"), json.loads(json.dumps(sharing.made_by(point.recipe), default=str))
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

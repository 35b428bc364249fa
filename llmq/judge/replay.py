"""Provenance: every file of a run hashed again, and the run repeated and compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from llmq import recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import BESIDE, sha256, sha256_files
from llmq.guarded.files import library, read_json_object
from llmq.hashes import hashes, is_opened, other_file, recorded
from llmq.recipe import Recipe
from llmq.runs import paths as run_paths
from llmq.runs.paths import within
from llmq.source import read
from llmq.types import JsonObject, Model

NOISY = ("peak_memory", "peak_memory_of_process")
"""Figures that no two runs share."""


@dataclass(frozen=True)
class Verified:
    """The files of a run that changed, vanished or came since the run ended."""

    same: int
    changed: Sequence[str]
    missing: Sequence[str]
    added: Sequence[str]
    base: str
    """The fault of the base, which lies outside of the run; empty if it is the same."""

    @property
    def whole(self) -> bool:
        """True if no file changed or vanished, the base is the same, and no model is opened with an added file."""
        return not (self.changed or self.missing or self.base or any(map(is_opened, self.added)))


def verify(run: Path) -> Verified:
    """Hash every file of a run again, and the base that the run began from."""
    run_paths.check(run)
    with library(run, "run"):
        return _verified(run)


def _verified(run: Path) -> Verified:
    then, now = recorded(run), hashes(run)
    changed = [name for name in then if name in now and now[name] != then[name]]
    missing = [name for name in then if name not in now]
    added = [name for name in now if name not in then]
    return Verified(len(then) - len(changed) - len(missing), changed, missing, added, _base(run))


def _base(run: Path) -> str:
    """The fault of the base that the run began from, or nothing; report and base keep the hashes."""
    report = _report(run)
    measured = dict.fromkeys(m["stage"] for m in report["measurements"])
    folder = within(run, next(iter(measured), "0-base"), run / "report.json")
    if not (folder / "artifact.json").is_file():  # an evaluation, whose base is a stage, or a folder of weights
        folder = Path(str(report["environment"].get("called_from")), str(report["recipe"].get("target")))
    if not any((folder / name).is_file() for name in ("artifact.json", "config.json")):
        return ""
    try:
        is_stage = (folder / "artifact.json").is_file()
        artifact = Artifact.load(folder) if is_stage else Artifact(cast("Model", None), folder)
        if sha256_files(artifact.weight_files()) != report["environment"]["model_sha256"]:
            return f"{artifact.weights}: the weights are not those that were measured"
        if name := other_file(artifact, folder, lambda file, kept: sha256(file) == kept.get("sha256")):
            return f"{artifact.weights}: {name} is not the one that the run began from"
    except OSError as error:
        return f"the weights cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / 'artifact.json'} does not describe a stage"
    return ""


def _report(run: Path) -> JsonObject:
    try:
        report = read_json_object(run / "report.json")
        return {**report, **{key: report[key] for key in ("measurements", "environment", "recipe")}}
    except (UserError, KeyError):
        raise UserError(f"{str(run)!r} has no whole report.json") from None


@dataclass(frozen=True)
class Difference:
    """One difference between a replay and its run."""

    what: str
    then: str
    now: str


@dataclass(frozen=True)
class Replayed:
    """A run made again, beside the first."""

    folder: str
    files: int
    """The number of files of stages that came back with the same bytes."""
    figures: int
    """The number of figures that came back the same."""
    surroundings: Sequence[Difference] = field(default_factory=tuple)
    """Libraries, machine and data that are others now; they explain the rest."""
    differences: Sequence[Difference] = field(default_factory=tuple)

    @property
    def same(self) -> bool:
        """True if every file and every figure came back."""
        return not self.differences

    def plain(self) -> JsonObject:
        """The comparison as JSON holds it."""
        return {**asdict(self), "same": self.same}


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run, checked anew."""
    file = run / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{str(run)!r} has no recipe.yaml, so it is no run of llmq that could be replayed")
    return recipe.parse(read(file), run.resolve().name)


def replay(run: Path, out: Path, run_recipe: Callable[[Recipe, Path], object]) -> Replayed:
    """Run the recipe of `run` again into `out` by `run_recipe`, and compare the two runs."""
    run_paths.check(run)
    job = recipe_of(run)
    recorded(run)
    run_recipe(job, out)
    return beside(run, out)


def beside(first: Path, second: Path) -> Replayed:
    """Two runs of one recipe: the bytes of every stage, then every figure that is no stopwatch's."""
    with library(first, "run"):
        return _beside(first, second)


def _beside(first: Path, second: Path) -> Replayed:
    then, now = _of_stages(recorded(first)), _of_stages(recorded(second))
    told = [Difference(name, then.get(name, "not there")[:12], now.get(name, "not there")[:12]) for name in then | now]
    files = [d for d in told if d.then != d.now]
    before, after = dict(_figures(first)), dict(_figures(second))
    both = [Difference(name, before.get(name, "not there"), after.get(name, "not there")) for name in before | after]
    figures = [d for d in both if d.then != d.now]
    around = list(_surroundings(_report(first)["environment"], _report(second)["environment"]))
    return Replayed(str(second), len(told) - len(files), len(both) - len(figures), around, [*files, *figures])


def _of_stages(found: Mapping[str, str]) -> dict[str, str]:
    """The hashes of files that steps made, without measurements and times."""
    made = {}
    for name, value in found.items():
        within = Path(name).parts[1:]
        if within and within[0] not in BESIDE:
            made[name] = value
    return made


def _figures(run: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(run.glob("*/measurements.json")):
        for m in read_json_object(file)["measurements"]:
            if m["metric"] not in NOISY:
                yield f"{file.parent.name}: {m['task']} {m['metric']}", repr(m["value"])


def _surroundings(then: JsonObject, now: JsonObject) -> Iterator[Difference]:
    for name in sorted((then.keys() | now.keys()) - {"called_from", "run", "ended"}):
        one, other = then.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _surroundings(one, other)
        elif one != other:
            yield Difference(name, str(one), str(other))

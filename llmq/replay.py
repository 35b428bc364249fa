"""Provenance: the hash of every file that a run left, and the run made again to be set beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmq import run_paths
from llmq.errors import UserError
from llmq.files import BESIDE, sha256, sha256_files, write_json
from llmq.guarded import json_files
from llmq.guarded.files import library
from llmq.run_folder import LOCK
from llmq.run_paths import within

FILE = "hashes.json"
UNHASHED = (FILE, "log.txt", LOCK)
"""They go on changing, or would have to hash themselves."""
TEXTS = (".json", ".md")
NOISY = ("peak_memory",)
"""Figures that no two runs share."""


@dataclass(frozen=True)
class Verified:
    """What became of the files of a run since it ended."""

    same: int
    changed: Sequence[str]
    missing: Sequence[str]
    added: Sequence[str]
    base: str
    """Empty, or what is wrong with the base, which lies outside of the run."""

    @property
    def whole(self) -> bool:
        """Whether the run is what it was. Files that were added harm nothing."""
        return not (self.changed or self.missing or self.base)


def record(run: Path) -> None:
    """Write the hash of every file of a run into it."""
    write_json(run / FILE, {"files": hashes(run)})


def hashes(run: Path) -> dict[str, str]:
    """The hash of every file of a run."""
    found = sorted(f for f in run.rglob("*") if f.is_file() and f.relative_to(run).parts[0] not in UNHASHED)
    return {f.relative_to(run).as_posix(): sha256(f) for f in found}


def recorded(run: Path) -> dict[str, str]:
    """The hashes that a run wrote when it ended. Raises `UserError` for a folder that has none."""
    file = run / FILE
    if not file.is_file():
        hint = "it did not end, or is older than hashes" if (run / "recipe.yaml").is_file() else "it is no run of llmq"
        raise UserError(f"{str(run)!r} has no {FILE}: {hint}")
    try:
        found = json_files.read_object(file)["files"]
        return {str(name): str(value) for name, value in found.items()}
    except (UserError, KeyError, AttributeError):
        raise UserError(f"{str(file)!r} holds no hashes of llmq") from None


def verify(run: Path) -> Verified:
    """Hash every file of a run again, and the base that it began from."""
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
    """What is wrong with the weights that the run began from; the report keeps their hash."""
    from llmq.artifact import Artifact

    report = _report(run)
    measured = dict.fromkeys(m["stage"] for m in report["measurements"])
    folder = within(run, next(iter(measured), "0-base"), run / "report.json")
    if not (folder / "artifact.json").is_file():
        return ""
    try:
        artifact = Artifact.load(folder)
        if sha256_files(artifact.weight_files()) != report["environment"]["model_sha256"]:
            return f"{artifact.weights}: the weights are not those that were measured"
    except OSError as error:
        return f"the weights cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / 'artifact.json'} does not describe a stage"
    return ""


def _report(run: Path) -> dict[str, Any]:
    try:
        report = json_files.read_object(run / "report.json")
        return {**report, "measurements": report["measurements"], "environment": report["environment"]}
    except (UserError, KeyError):
        raise UserError(f"{str(run)!r} has no whole report.json") from None


@dataclass(frozen=True)
class Difference:
    """Something in which a replay is not what the run was."""

    what: str
    then: str
    now: str


@dataclass(frozen=True)
class Replayed:
    """A run made again, beside the first."""

    folder: str
    files: int
    """How many files of stages came back with the same bytes."""
    figures: int
    """How many figures came back the same."""
    surroundings: Sequence[Difference] = field(default_factory=tuple)
    """Libraries, machine and data that are others now; they explain the rest."""
    differences: Sequence[Difference] = field(default_factory=tuple)

    @property
    def same(self) -> bool:
        """Whether every file and every figure came back."""
        return not self.differences

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "same": self.same}


def recipe_of(run: Path) -> Any:
    """The recipe of a run, checked anew."""
    from llmq import recipe, source

    file = run / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{str(run)!r} has no recipe.yaml, so it is no run of llmq that could be replayed")
    return recipe.parse(source.read(file), run.resolve().name)


def replay(run: Path, out: Path) -> Replayed:
    """Run the recipe of a run again into `out`, every answer asked anew, and set the two side by side."""
    from llmq import pipeline

    run_paths.check(run)
    job = recipe_of(run)
    recorded(run)
    pipeline.run(job, out, cache=False)
    return beside(run, out)


def beside(first: Path, second: Path) -> Replayed:
    """Two runs of one recipe: the bytes of every stage, then every figure that is no stopwatch's."""
    with library(first, "run"):
        return _beside(first, second)


def _beside(first: Path, second: Path) -> Replayed:
    then, now = _of_stages(recorded(first)), _of_stages(recorded(second))
    told = [Difference(name, then.get(name, "not there")[:12], now.get(name, "not there")[:12]) for name in then | now]
    files = [d for d in told if d.then != d.now and not _same_elsewhere(d.what, first, second)]
    before, after = dict(_figures(first)), dict(_figures(second))
    both = [Difference(name, before.get(name, "not there"), after.get(name, "not there")) for name in before | after]
    figures = [d for d in both if d.then != d.now]
    around = list(_surroundings(_report(first)["environment"], _report(second)["environment"]))
    return Replayed(str(second), len(told) - len(files), len(both) - len(figures), around, [*files, *figures])


def _same_elsewhere(name: str, first: Path, second: Path) -> bool:
    """Whether a text differs only in where its run lies: peft writes the folder of the base into an adapter."""
    pair = [(run / name, str(run.resolve()).encode()) for run in (first, second)]
    if Path(name).suffix not in TEXTS or not all(file.is_file() for file, _ in pair):
        return False
    one, other = (file.read_bytes().replace(place, b"") for file, place in pair)
    return one == other


def _of_stages(found: Mapping[str, str]) -> dict[str, str]:
    """The hashes of what steps made: not of what was measured, nor of what tells how long it took."""
    made = {}
    for name, value in found.items():
        within = Path(name).parts[1:]
        if within and within[0] not in BESIDE:
            made[name] = value
    return made


def _figures(run: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(run.glob("*/measurements.json")):
        for m in json_files.read_object(file)["measurements"]:
            if m["metric"] not in NOISY:
                yield f"{file.parent.name}: {m['task']} {m['metric']}", repr(m["value"])


def _surroundings(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name in sorted((then.keys() | now.keys()) - {"called_from", "run"}):
        one, other = then.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _surroundings(one, other)
        elif one != other:
            yield Difference(name, str(one), str(other))

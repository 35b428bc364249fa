"""Predictions of one stage or model about files: gathered, checked, and written whole into a new folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import fsencode
from pathlib import Path
from typing import Any

from llmq import partials, reading, recipe
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import at_home
from llmq.predictors import Input, Inputs, Predictor, settings
from llmq.source import read
from llmq.terminal import say, track
from llmq.types import Context, JsonObject, Model
from llmq.vision.folders import under


@dataclass(frozen=True)
class Predictions:
    """What was written where: `rows` answers about `inputs` files, and the bad files with the reasons."""

    folder: Path
    files: tuple[Path, ...]
    inputs: int
    rows: int
    skipped: Mapping[str, str]


def predict(
    artifact: Artifact[Any],
    inputs: Sequence[str | Path],
    out: Path,
    options: JsonObject,
    context: Context,
    skip_bad: bool = False,
) -> Predictions:
    """Write what a model says about files, and about those in folders, to the new folder `out`.

    `options` are the fields of the family's `Predictor`. Raises `UserError` for the first bad file before the model is
    opened, unless `skip_bad` leaves such files out; nothing is left then.
    """
    model: Model = artifact.model
    predictor = _built(model, {"seed": context.seed, **_of_run(artifact, model.predictor())}, options)
    if Path.cwd().is_relative_to(out.resolve()):  # a folder made anew would not be the one that the terminal is in
        raise UserError(f"--out {str(out)!r} is the folder that the command runs in; name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} exists and is not empty; use a new --out")
    found = _gathered(predictor, inputs, skip_bad, model)
    sound = list(_checked(predictor, found, model))
    if found.items and not sound:
        raise UserError(f"all {len(found.items)} files are bad; the first: {next(iter(found.skipped.values()))}")
    _check_apart(predictor, sound)
    kept = Inputs(sound, skip_bad, found.skipped, found.passed_over)
    with artifact.open(context.device) as loaded, partials.partial_of(out, folder=True) as partial:
        rows = predictor.write(loaded, kept, partial)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Predictions(out, tuple(files), len(sound), rows, kept.skipped)


def _built(model: Model, usual: JsonObject, options: JsonObject) -> Predictor:
    """The predictor of a family with these options; of the `usual` settings it takes those that it knows."""
    kind = model.predictor()
    known = kind.model_fields
    for name in options:
        if name not in known:
            theirs = ", ".join(f"--{each.replace('_', '-')}" for each in known if each != "names")
            raise UserError(f"--{name.replace('_', '-')} is no option of {model.kind} models; theirs: {theirs}")
    return settings(kind, {**{name: value for name, value in usual.items() if name in known}, **options})


def _of_run(artifact: Artifact[Any], kind: type[Predictor]) -> JsonObject:
    """The settings that the run of a stage tells: the window of its training data, and the names of the classes."""
    if not (artifact.weights / "artifact.json").is_file() or not {"window", "names"} & kind.model_fields.keys():
        return {}
    file = artifact.weights.resolve().parent / "recipe.yaml"
    if not file.is_file():
        return {}
    window = next(_windows(read(file).data), None)
    told: JsonObject = {"window": tuple(window)} if window else {}
    return told | ({"names": _classes(artifact)} if "names" in kind.model_fields else {})


def _windows(value: object) -> Iterator[Sequence[float]]:
    """The windows in a recipe; that of a registered low-resolution partner goes before the other."""
    if isinstance(value, dict):
        for key in ("partner_window", "window"):
            if isinstance(value.get(key), list) and len(value[key]) == 2:
                yield value[key]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _windows(each)


def _classes(artifact: Artifact[Any]) -> Mapping[int, str]:
    """The names of the outputs by the data that the run trained on, where the weights name none."""
    try:
        job = recipe.of_run(str(artifact.weights))
        trained = (
            [data for step in job.steps if step.uses == "training" for data in reading.data_of(step)] if job else []
        )
        return artifact.model.outputs_of(trained[-1].read()) if trained else {}
    except UserError as error:
        say(f"classes are numbers where the weights name none, as the run's data cannot be read: {error}")
        return {}


def _gathered(predictor: Predictor, paths: Sequence[str | Path], skip_bad: bool, model: Model) -> Inputs:
    """All files that are named, and those in the folders that are named, in the order of their paths."""
    if paths and not predictor.suffixes:
        raise UserError(f"{str(paths[0])!r}: a {model.kind} model reads no files; it makes pictures of --seed alone")
    if predictor.reads_files and not paths:
        raise UserError(
            f"a {model.kind} model needs files, or folders of them ({', '.join(sorted(predictor.suffixes))})"
        )
    found = Inputs([], skip_bad)
    for path in map(at_home, paths):
        for file, place in _files(path, predictor, found):
            found.items.append(Input(file, place, fsencode(place).decode("utf-8", "backslashreplace")))
    if found.passed_over:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(found.passed_over.items()))
        say(f"passed over in the folders: {told}")
    return found


def _files(path: Path, predictor: Predictor, found: Inputs) -> Iterator[tuple[Path, Path]]:
    """The file, or the files in a folder, each with the place relative to the folder."""
    if not path.is_dir():
        yield path, Path(path.name)
        return
    inside = under(path, predictor.suffixes)
    found.passed_over.update(
        {
            "other files" if reason == "no_image" else reason.replace("_", " "): n
            for reason, n in inside.left_out.items()
        }
    )
    if not inside.images:
        raise UserError(f"{str(path)!r} has no file to read ({', '.join(sorted(predictor.suffixes))})")
    for file in inside.images:
        yield file, file.relative_to(path)


def _check_apart(predictor: Predictor, items: Sequence[Input]) -> None:
    """Raise `UserError` for two files whose answers would be one file."""
    taken: dict[Path, Path] = {}
    for item in items:
        for target in predictor.targets(item):
            if target in taken:
                both = f"{str(item.path)!r} and {str(taken[target])!r}"
                raise UserError(f"{both} would both become {str(target)!r}; take two --out")
            taken[target] = item.path


def _checked(predictor: Predictor, found: Inputs, model: Model) -> Iterator[Input]:
    """The files that can be read."""
    for item in track(found.items, "checking"):
        is_sound = False
        with found.bad_skipped(str(item.path)):
            if not item.path.exists():
                raise UserError(f"there is no file {str(item.path)!r}")
            predictor.check(item, model)
            is_sound = True
        if is_sound:
            yield item

"""A model on disk: the paths of the files, the family that opens them, and `artifact.json` in the stage's folder."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

from llmq.errors import UserError
from llmq.guarded.weights import FILE_BYTES, FILE_TYPES
from llmq.types import Exhibit, JsonObject, Loaded, M_co, Measurement, Step

MACHINE = "machine.json"
"""The file of a stage for facts that depend on the machine, the folder or the time."""
TIMES = ("seconds", "tokens_per_second", "examples_per_second", "peak_memory", "processes")
"""Notes that are measured times or memory, or how many processes shared the work, and so differ from run to run."""


@dataclass(frozen=True)
class Artifact(Generic[M_co]):
    """A model on disk: the family that opens it, and the paths of the files. A stage keeps it as `artifact.json`."""

    model: M_co
    weights: Path
    adapter: Path | None = None
    runtime: str = "torch"
    packed: bool = False
    history: tuple[str, ...] = ()
    notes: JsonObject = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    @contextmanager
    def open(self, device: str) -> Iterator[Loaded[M_co]]:
        """Load the model, and free the memory when the block ends."""
        from llmq.environment import release_memory
        from llmq.guarded.files import library
        from llmq.guarded.weights import check_folder

        for folder in filter(None, (self.weights, self.adapter)):
            check_folder(folder)
        with library(self.weights, f"model that {self.model.word} opens"):
            loaded: Loaded[Any] = self.model.open(self, device)
        try:
            yield loaded
        finally:
            loaded.module = None  # the caller's name for `loaded` lives on after the block; the network must not
            release_memory(device)

    @contextmanager
    def closed(self, loaded: Loaded[Any]) -> Iterator[None]:
        """Free the memory of the open model for the block, and open the model again after it."""
        from llmq.environment import release_memory

        loaded.module = None
        release_memory(loaded.device)
        try:
            yield
        finally:
            loaded.module = self.model.open(self, loaded.device).module

    def then(self, step: Step[Any], **changes: Any) -> "Artifact[M_co]":
        """The artifact that `step` made of this one. `notes` and `measurements` belong to one stage and start anew."""
        fresh = {"history": (*self.history, step.word), "notes": {}, "measurements": ()}
        return replace(self, **{**fresh, **changes})

    def weight_files(self) -> list[Path]:
        """The files of the weights and of the adapter."""
        from llmq.guarded.weights import weight_files

        files = weight_files(self.weights)
        return files + ([self.adapter / "adapter_model.safetensors"] if self.adapter else [])

    @property
    def bytes_on_disk(self) -> int:
        """The size of the files of the weights and of the adapter; of a base in GGUF that of the file itself."""
        return int(self.notes.get(FILE_BYTES) or sum(f.stat().st_size for f in self.weight_files()))

    @property
    def stored(self) -> str:
        """The dtypes of the weights on disk (`guarded.weights.stored_as`); of a base in GGUF the file's own types."""
        from llmq.guarded.weights import stored_as

        return str(self.notes.get(FILE_TYPES) or stored_as(self.weight_files()))

    @property
    def is_gguf(self) -> bool:
        """True for a GGUF file, which is opened dequantized."""
        return self.runtime == "gguf" or FILE_BYTES in self.notes

    def save(self, folder: Path, **about: object) -> None:
        """Write `artifact.json`, whose bytes are the same for the same recipe, and `machine.json`.

        `machine.json` holds times, and the paths of weights outside of the run, and more that is told `about` them.
        Other paths are relative to `folder`.
        """
        from llmq.files import portable_path, write_json

        notes, times = _without_times(self.notes)
        data = {f: getattr(self, f) for f in ("runtime", "packed", "history")}
        data["notes"] = notes
        data["model"] = {self.model.word: self.model.model_dump(mode="json")}
        weights = portable_path(self.weights, folder)
        outside = Path(weights).is_absolute()
        data["weights"] = None if outside else weights
        data["adapter"] = portable_path(self.adapter, folder) if self.adapter else None
        data["measurements"] = [asdict(m) for m in self.measurements]
        write_json(folder / "artifact.json", data)
        # The absolute path, and the relative one in case the run and the weights are moved together.
        places = [weights, os.path.relpath(weights, folder.resolve())] if outside else []
        write_json(folder / MACHINE, {"weights": places, "notes": times, **about})

    @classmethod
    def load(cls, folder: Path) -> "Artifact[Any]":
        """Read `artifact.json` of a stage, and `machine.json` if there is one."""
        from llmq import plugin
        from llmq.guarded.files import read_json_object
        from llmq.runs.paths import within

        data = read_json_object(folder / "artifact.json")
        machine = read_json_object(folder / MACHINE) if (folder / MACHINE).exists() else {}
        ((word, settings),) = data["model"].items()
        if not str(word).startswith("models."):
            raise UserError(f"{str(folder / 'artifact.json')!r}: {word!r} is no word of models")
        model: Any = plugin.load(word).model_validate(settings)
        measurements = tuple(Measurement.of(m) for m in data["measurements"])
        file = folder / "artifact.json"
        name = _outside(folder, machine) if data["weights"] is None else str(data["weights"])
        adapter = within(folder.parent, _in_run(folder, data["adapter"]), file) if data["adapter"] else None
        # The base may lie anywhere; files that the run made have paths relative to the stage, inside the run.
        outside = Path(name).is_absolute()
        weights = Path(name).resolve() if outside else within(folder.parent, _in_run(folder, name), file)
        history = tuple(data["history"])
        notes = _with_times(data["notes"], machine.get("notes", {}))
        return cls(model, weights, adapter, data["runtime"], data["packed"], history, notes, measurements)


def _outside(folder: Path, machine: JsonObject) -> str:
    """The path of weights that lie outside of the run."""
    if not machine.get("weights"):
        raise UserError(f"{str(folder)!r}: its weights lie outside, and no {MACHINE} beside it says where")
    places: list[Path] = [folder.resolve() / place for place in machine["weights"]]
    return os.path.normpath(next((place for place in places if place.exists()), places[0]))


def _without_times(notes: JsonObject) -> tuple[JsonObject, JsonObject]:
    """The notes without measured times, and the measured times alone."""
    rest, times = {}, {}
    for name, value in notes.items():
        if name in TIMES:
            times[name] = value
            continue
        rest[name] = value
        if isinstance(value, Mapping):
            rest[name], inner = _without_times(dict(value))
            times |= {name: inner} if inner else {}
    return rest, times


def _with_times(notes: JsonObject, times: JsonObject) -> JsonObject:
    nested = {name: _with_times(notes[name], value) for name, value in times.items() if isinstance(value, dict)}
    return {**notes, **times, **nested}


@dataclass(frozen=True)
class Failure:
    """A task that failed at a stage: the method called (`score`, `against`, `clocks`), and the error in one line."""

    task: str
    asked: str
    error: str


@dataclass(frozen=True)
class Stage:
    """A stage of a run, with the answers of all tasks."""

    name: str
    artifact: Artifact[Any]
    measurements: tuple[Measurement, ...] = ()
    exhibits: tuple[Exhibit, ...] = ()
    reused: tuple[str, ...] = ()
    """The tasks whose answers were kept from an earlier run."""
    failures: tuple[Failure, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    """Seconds, peak memory above the process without a model, and `processes`, of the tasks about this stage alone."""


def _in_run(folder: Path, name: object) -> str:
    """A path relative to the folder of a stage, made relative to the run."""
    return f"{folder.resolve().name}/{name}" if not Path(str(name)).is_absolute() else str(name)

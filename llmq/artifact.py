"""A model at rest: where it lies, how to open it, and how it is written to and read from its stage's folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmq.errors import UserError
from llmq.types import Loaded, Measurement, Model, Samples, Step


@dataclass(frozen=True)
class Artifact:
    """A model at rest: how to open it and where it lies. Written to `artifact.json` in its stage's folder."""

    model: Model
    weights: Path
    adapter: Path | None = None
    runtime: str = "torch"
    packed: bool = False
    history: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    @contextmanager
    def open(self, device: str) -> Iterator[Loaded]:
        """Load it, and free it again."""
        from llmq.guarded.models import opened
        from llmq.measure import release_memory

        loaded = opened(self, device)
        try:
            yield loaded
        finally:
            # The caller's name for it lives on after the block; what it holds must not.
            object.__setattr__(loaded, "module", None)
            release_memory(device)

    def then(self, step: Step, **changes: Any) -> "Artifact":
        """What `step` makes of it. `notes` and `measurements` belong to one stage and start anew."""
        fresh = {"history": (*self.history, step.word), "notes": {}, "measurements": ()}
        return replace(self, **{**fresh, **changes})

    def weight_files(self) -> list[Path]:
        """The files that hold its weights and its adapter."""
        from llmq.files import weight_files

        files = weight_files(self.weights)
        return files + ([self.adapter / "adapter_model.safetensors"] if self.adapter else [])

    def save(self, folder: Path) -> None:
        """Write `artifact.json`, its paths relative to `folder` where they lie within the same run."""
        from llmq.files import portable_path, write_json

        data = {f: getattr(self, f) for f in ("runtime", "packed", "history", "notes")}
        data["model"] = {self.model.word: self.model.model_dump(mode="json")}
        data["weights"] = portable_path(self.weights, folder)
        data["adapter"] = portable_path(self.adapter, folder) if self.adapter else None
        data["measurements"] = [asdict(m) for m in self.measurements]
        write_json(folder / "artifact.json", data)

    @classmethod
    def load(cls, folder: Path) -> "Artifact":
        """Read a stage's `artifact.json`."""
        from llmq import plugin
        from llmq.guarded import json_files
        from llmq.run_paths import within

        data = json_files.read_object(folder / "artifact.json")
        ((word, settings),) = data["model"].items()
        if not str(word).startswith("models."):
            raise UserError(f"{str(folder / 'artifact.json')!r}: {word!r} is no word of models")
        model: Any = plugin.load(word).model_validate(settings)
        measurements = tuple(measurement_from(m) for m in data["measurements"])
        file, name = folder / "artifact.json", str(data["weights"])
        adapter = within(folder.parent, _in_run(folder, data["adapter"]), file) if data["adapter"] else None
        # The base may lie anywhere; what the run made is named from its stage, and lies in the run.
        outside = Path(name).is_absolute()
        weights = Path(name).resolve() if outside else within(folder.parent, _in_run(folder, name), file)
        history = tuple(data["history"])
        same = {f: data[f] for f in ("runtime", "packed", "notes")}
        return cls(model, weights, adapter, history=history, measurements=measurements, **same)


def _in_run(folder: Path, name: object) -> str:
    """A path that is named from a stage's folder, as it is named from the run."""
    return f"{folder.resolve().name}/{name}" if not Path(str(name)).is_absolute() else str(name)


def measurement_from(data: Mapping[str, Any]) -> Measurement:
    """A `Measurement` out of its JSON.

    Before schema version 2 no entry says whether it is exact: a single count had a standard error of 0 and no samples.
    """
    for name in ("task", "metric", "unit", "better", "convention"):
        if not isinstance(data[name], str):
            raise TypeError(f"{name!r} of a measurement is no text")
    old = "exact" not in data
    exact = data["stderr"] == 0 and data["n"] == 1 and not data.get("samples") if old else data["exact"]
    if samples := data.get("samples"):
        tuples = {k: tuple(samples[k]) for k in ("values", "weights", "clusters", "ids") if samples.get(k)}
        if len({len(its) for its in tuples.values()}) > 1:
            raise TypeError(f"the samples of {data['metric']!r} have parts of unlike length")
        samples = Samples(**{**samples, **tuples})
    return Measurement(**{**data, "samples": samples, "exact": exact})

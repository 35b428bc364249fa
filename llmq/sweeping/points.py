"""The runs of a sweep: one `Point` each, and all of them at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.types import JsonObject, Measurement

if TYPE_CHECKING:
    from llmq.recipe import Recipe


Settings = Mapping[str, object]
"""Overrides of a recipe: `{"adapt.lora.r": 32}`."""
DONE = (0, 1, 3)
"""The exit codes of a run that ended: its gate passed, failed, or is undecided."""


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

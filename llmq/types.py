"""The nouns of the house. Read this first.

A `Model` opens weights. `Step`s change them. `Task`s question them. `Data` feeds both. Between steps a model is an
`Artifact` at rest in a folder; opened, it is a `Loaded`. Every answer is a `Measurement`, or an `Exhibit` to look at.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from llmq.errors import LlmqError
from llmq.needs import Needs

if TYPE_CHECKING:
    from llmq.artifact import Artifact

Better = Literal["higher", "lower", "unknown"]
"""The direction of a figure; of an unknown one there is no verdict and no gate."""


class Plugin(BaseModel):
    """A recipe word: the class is its schema, its validation and its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @property
    def word(self) -> str:
        """The path of the file that defines it: `quantize.bnb`."""
        return type(self).__module__.removeprefix("llmq.")

    def parts(self) -> "Iterator[tuple[tuple[str | int, ...], Plugin]]":
        """Every plug-in among its settings, however deep, after the place where it stands: `("data",)`, `("mix", 0)`.

        What a step or a task reads is found here and nowhere else.
        """
        for place, part in _plugins_in(self, ()):
            yield place, part
            yield from (((*place, *within), inner) for within, inner in part.parts())

    def unset_data(self, kind: str) -> "Mapping[str, Data]":
        """The data of it that nobody named, by field, and what it reads where a run of this kind has none of its own.

        `reading` puts the run's own data there.
        """
        unset = [name for name in type(self).model_fields if name not in self.model_fields_set]
        return {name: its for name in unset if isinstance(its := getattr(self, name), Data)}

    def needs(self) -> Needs:
        """What it needs of a language model, where it is a step or a task."""
        return Needs()

    def check(self) -> None:
        """Raise `UserError` for what can be seen to be wrong before anything is loaded. Imports nothing heavy.

        Plug-ins among its settings are checked here: a word with a check of its own calls this one, too.
        """
        for _, part in _plugins_in(self, ()):
            part.check()


def _plugins_in(value: object, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Plugin]]:
    """The outermost plug-ins in a value, in lists, mappings and settings within it."""
    items: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, BaseModel):
        items = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        items = enumerate(value)
    for key, its in items:
        if isinstance(its, Plugin):
            yield (*place, key), its
        else:
            yield from _plugins_in(its, (*place, key))


@dataclass(frozen=True)
class Context:
    """What a run gives to each of its steps."""

    device: str
    seed: int


class Model(Plugin):
    """How to open weights of one family; `suite` measures those of its kind where none is named."""

    kind: ClassVar[str]
    suite: ClassVar[str]

    def check_trust(self) -> None:
        """Raise `UserError` where it asks to run code that this command was not told to trust."""

    def base(self, context: Context) -> "Artifact":
        """Bring the weights to this machine and return them untouched."""
        raise NotImplementedError

    def open(self, artifact: "Artifact", device: str) -> "Loaded":
        """Load an artifact of this family, of any stage, ready for inference."""
        raise NotImplementedError

    def probe(self, module: Any) -> "Sequence[Any]":
        """What an open module answers to one fixed input, as tensors: the same for the same weights."""
        raise NotImplementedError

    def check_fits(self, artifact: "Artifact", needs: Mapping[str, Needs]) -> None:
        """Raise `UserError` for parts that do not fit each other, or lack what a step or task, by its name, needs."""

    def outputs_of(self, split: "Split") -> Mapping[int, str]:
        """The class that each output stands for by its number alone, where no name that the weights know decides."""
        return {}

    def clocks(self, loaded: "Loaded", speed: Any) -> "Iterable[Clock]":
        """The units of work that tell how fast this family is; `speed` is the task that asks, with its settings."""
        raise NotImplementedError


class Step(Plugin):
    """A change to a model: folder in, folder out; the input is never altered.

    `requires` and `leaves` speak of the two states an artifact can be in (`packed`, `adapter`); the recipe loader folds
    the one over the other before anything runs.
    """

    suits: ClassVar[frozenset[str]]
    requires: ClassVar[Mapping[str, bool]] = {}
    leaves: ClassVar[Mapping[str, bool]] = {}
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "calibration"
    """The use it makes of its data. What is trained or calibrated on is what the tasks of the run read, too."""
    writes: ClassVar[float] = 1.0
    """The bytes it writes for each byte of the weights that it is given."""
    in_every_process: ClassVar[bool] = False
    """Whether the step shares its work out where a run has several processes; others are done by the first."""

    def check_base(self, base: "Artifact") -> None:
        """Raise `UserError` for what the base, once it is there, shows to be wrong; called before the first step."""

    def space(self, artifact: "Artifact") -> int:
        """About how many bytes it writes into its folder, checkpoints included; looked for before it begins."""
        from llmq.files import bytes_of

        return int(self.writes * bytes_of(artifact.weight_files()))

    def apply(self, artifact: "Artifact", folder: Path, context: Context) -> "Artifact":
        """Write the changed model into `folder` (empty, or what a killed run left there) and return it."""
        raise NotImplementedError


class Task(Plugin):
    """A question to a model. It overrides at least one of `score`, `against` and `clocks`."""

    suits: ClassVar[frozenset[str]]
    shapes: ClassVar[frozenset[str]] = frozenset()
    """The shapes of examples that it can be asked on; empty: all that data of its kinds can have."""

    @property
    def name(self) -> str:
        """What its measurements are filed under: `perplexity`."""
        return self.word.rpartition(".")[2]

    @property
    def figures_of(self) -> tuple[str, ...]:
        """The names that its measurements can be filed under: its own, or those of the tasks that it stands for."""
        return (self.name,)

    def depends(self) -> "Mapping[str, Any] | None":
        """What its answers depend on besides its settings, the `Data` among them, and the model.

        Asked before anything is opened; raises `UserError` for data that is not there. Answers of a task that says so
        are kept and used again (`answers`); those of a task that returns None never are.
        """
        return None

    def check_base(self, base: "Artifact") -> None:
        """Raise `UserError` for data that the model cannot be asked about; called before the first step."""

    def score(self, loaded: "Loaded") -> "Iterable[Answer]":
        """Answer about one stage that is open alone."""
        return ()

    def against(self, loaded: "Loaded", base: "Loaded") -> "Iterable[Answer]":
        """Answer about a stage beside the stage that all are compared with; both are open, and they differ."""
        return ()

    def clocks(self, loaded: "Loaded") -> "Iterable[Clock]":
        """Units of work to be timed, in turn with those of every other stage."""
        return ()


@dataclass(frozen=True)
class Split:
    """Examples in two parts that share nothing, with the count of what became of every row read."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    shape: str
    counts: Mapping[str, int]
    sha256: str
    classes: tuple[str, ...] = ()
    """What the labels of the examples stand for, where they have labels."""
    unused: tuple[str, ...] = ()
    """Columns of the data that nothing was made of."""


class Data(Plugin):
    """A source of examples for the kinds of models that it suits."""

    suits: ClassVar[frozenset[str]]
    shapes: ClassVar[frozenset[str]] = frozenset()
    """The shapes that its examples can have; empty where only reading tells."""

    @classmethod
    def takes(cls, path: str) -> bool:
        """Whether a bare path, where a recipe names data, means this data with that `path`."""
        return False

    def read(self) -> Split:
        """All rows, checked. Raises `UserError` naming file, line and column of the first bad one."""
        raise NotImplementedError


@dataclass(frozen=True)
class Samples:
    """The per-sample scores behind a figure, in an order that is the same for every stage.

    The figure is the sum of `values` over the sum of `weights` (`mean`), its exponential (`exp`), or a quantile of the
    values (`quantile`). Without weights each sample weighs 1. `clusters` numbers the document of each sample where
    several share one: what is drawn anew is then the document. `ids` names the document of each sample: two stages are
    compared on the documents that both scored.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    statistic: Literal["mean", "exp", "quantile"] = "mean"
    quantile: float = 0.5
    clusters: tuple[int, ...] | None = None
    ids: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Measurement:
    """One figure with everything needed to believe it. A standard error of None is unknown.

    `exact` says that the figure was counted, not sampled (bytes, parameters): no standard error says so. Raises
    `LlmqError` where the figure, its standard error or one of its samples is no finite number.
    `chance` is what blind guessing would score, where that is known: 1 in 4 choices, or the size of a vocabulary.
    """

    task: str
    metric: str
    value: float
    unit: str
    better: Better
    n: int
    stderr: float | None
    convention: str
    samples: Samples | None = field(default=None, compare=False, repr=False)
    chance: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        s = self.samples
        numbers = {
            "figure": (self.value,),
            "standard error": () if self.stderr is None else (self.stderr,),
            "score": s.values if s else (),
            "weight": s.weights or () if s else (),
        }
        for what, values in numbers.items():
            for i, value in enumerate(values):
                if not isfinite(value):
                    which = f" of sample {i}" if len(values) > 1 else ""
                    raise LlmqError(f"{self.task}: the {what}{which} of {self.metric} is {value}, no finite number")


@dataclass(frozen=True)
class Exhibit:
    """Something to look at: what a stage made of one input. The report sets the stages side by side.

    `picture` is a PNG; the pipeline keeps it as a file of the run and puts its path in `file`.
    """

    task: str
    title: str
    input: str
    output: str = ""
    reference: str = ""
    picture: bytes = field(default=b"", compare=False, repr=False)
    file: str = ""


@dataclass(frozen=True)
class Attachment:
    """A file that a task leaves in the folder of the stage it was asked about, for others' tools to read."""

    task: str
    file: str
    text: str = field(repr=False)


Answer = Measurement | Exhibit | Attachment


@dataclass(frozen=True)
class Reading:
    """A figure read off the seconds of one unit of work."""

    metric: str
    unit: str
    better: Better
    of_seconds: Callable[[float], float]
    quantile: float = 0.5


@dataclass(frozen=True)
class Clock:
    """One unit of work to be timed, and what its time says."""

    task: str
    run: Callable[[], None]
    readings: tuple[Reading, ...]
    convention: str
    warmup: int = 2
    rounds: int = 10


@dataclass(frozen=True)
class Loaded:
    """An artifact opened on a device."""

    module: Any
    processor: Any
    device: str
    artifact: "Artifact"

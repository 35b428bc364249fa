"""The nouns of the house. Read this first.

A `Model` opens weights. `Step`s change them. `Task`s question them. `Data` feeds both. Between steps a model is an
`Artifact` at rest in a folder; opened, it is a `Loaded`. Every answer is a `Measurement`, or an `Exhibit` to look at.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from typing_extensions import TypeVar

from llmq.errors import LlmqError, UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.artifact import Artifact
    from llmq.predictors import Predictor
    from llmq.sketch import Sketch, Work

M = TypeVar("M", bound="Model", default="Model", covariant=True)
"""The family of models that a step or a task works on."""
M_co = TypeVar("M_co", bound="Model", default="Model", covariant=True)
"""The family of a model at rest, or of an open one."""

JsonObject: TypeAlias = dict[str, Any]
"""An object as JSON or YAML holds it: texts, numbers, truths, nothing, lists and objects of them."""

Better = Literal["higher", "lower", "unknown"]
"""The direction of a figure; of an unknown one there is no verdict and no gate."""


@dataclass(frozen=True)
class Needs:
    """The demands of a step or task: positions for `tokens` at once; with `end_mark` a token that ends or pads texts.

    Errors name `setting`, by which the user sets `tokens`; `tokens` is 0 if inputs never exceed the model's limit.
    """

    setting: str = ""
    tokens: int = 0
    end_mark: bool = False


class Settings(BaseModel):
    """What a person writes: no unknown key, no number that is not finite, and no truth where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        if {int, float} & kinds and not {bool, object, Any} & kinds:
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for each in inner:
                if isinstance(each, bool):  # pydantic takes them for 1 and 0
                    raise ValueError(f"{str(each).lower()} ({'yes, on' if each else 'no, off'}) is no number")
        return value


def _kinds_in(annotation: object) -> set[object]:
    """The types that a type is made of."""
    parts = get_args(annotation)
    return set().union(*map(_kinds_in, parts)) if parts else {annotation}


class Plugin(Settings):
    """A recipe word: the class is the schema, the validation and the documentation."""

    @property
    def word(self) -> str:
        """The word in a recipe, which is the path of the file: `quantize.bnb`."""
        return type(self).__module__.removeprefix("llmq.")

    def parts(self) -> "Iterator[tuple[tuple[str | int, ...], Plugin]]":
        """Every plug-in among the settings, however deep, after the place of each: `("data",)`, `("mix", 0)`.

        This method alone finds the data that a step or a task reads.
        """
        for place, part in _plugins_in(self, ()):
            yield place, part
            yield from (((*place, *within), inner) for within, inner in part.parts())

    def unset_data(self, kind: str) -> "Mapping[str, Data]":
        """The default data of each unset field; `reading` puts the run's own data there."""
        unset = [name for name in type(self).model_fields if name not in self.model_fields_set]
        return {name: data for name in unset if isinstance(data := getattr(self, name), Data)}

    def refuse_unread(self, names: Iterable[str], why: str) -> None:
        """Raise `UserError` for the first of these settings that is set: nothing reads it, for the reason `why`."""
        if name := next((name for name in names if name in self.model_fields_set), None):
            raise UserError(f"{name} has no effect {why}; leave it out")

    def needs(self) -> Needs:
        """The demands of a step or a task on a language model."""
        return Needs()

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """Settings in place of these that take less memory, the nearest first; `llmq plan` names the first that fit."""
        return iter(())

    def check(self) -> None:
        """Raise `UserError` for faults that show before anything is loaded. Imports nothing heavy.

        This method checks the plug-ins among the settings, so an overriding method calls it, too.
        """
        for _, part in _plugins_in(self, ()):
            part.check()


def _plugins_in(value: object, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Plugin]]:
    """The outermost plug-ins in a value, or in lists, mappings and settings within the value."""
    items: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, BaseModel):
        items = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        items = enumerate(value)
    for key, inner in items:
        if isinstance(inner, Plugin):
            yield (*place, key), inner
        else:
            yield from _plugins_in(inner, (*place, key))


@dataclass(frozen=True)
class Context:
    """The device and the seed that a run gives to each of its steps."""

    device: str
    seed: int


class Model(Plugin):
    """A family of models, which opens weights; `suite` names the tasks where a recipe names none."""

    kind: ClassVar[str]
    suite: ClassVar[str]
    begins_in: ClassVar[str] = "torch"
    """The runtime of the base."""

    def check_trust(self) -> None:
        """Raise `UserError` for a model that needs code which this command does not trust."""

    def sketch(self) -> "Sketch":
        """The base as foretold from its configuration alone; neither weights nor data need be there."""
        from llmq.sketch import Sketch

        return Sketch((), "float32", unknown=f"{self.word} does not foretell its size")

    def download(self) -> str:
        """The repository that the weights must be fetched from; empty if they are here."""
        return ""

    def foresee_base(self) -> "Work":
        """The work of `base` on this machine as it is now, besides a download; none where a cache keeps its result."""
        from llmq.sketch import Work

        return Work()

    def file_bytes(self) -> int:
        """The bytes of the file that the base is, where the weights opened are made from it; else 0."""
        return 0

    def base(self, context: Context) -> "Artifact[Any]":
        """Bring the weights to this machine and return them untouched."""
        raise NotImplementedError

    def open(self, artifact: "Artifact", device: str) -> "Loaded":
        """Load an artifact of this family, of any stage, ready for inference."""
        raise NotImplementedError

    def probe(self, module: "Module") -> "Sequence[Tensor]":
        """The outputs of an open module for one fixed input: equal weights give equal outputs."""
        raise NotImplementedError

    def check_fits(self, artifact: "Artifact", needs: Mapping[str, Needs]) -> None:
        """Raise `UserError` for parts that do not fit each other, or not the `needs` of each step or task by name."""

    def check_runtime(self, runtime: str) -> None:
        """Raise `UserError` for a network that is not exported to a runtime."""

    def outputs_of(self, split: "Split") -> Mapping[int, str]:
        """The class of each output, for weights that know classes by number alone; empty where names decide."""
        return {}

    def clocks(self, loaded: "Loaded", workload: "Workload") -> "Iterable[Clock]":
        """The units of work that tell how fast this family is."""
        raise NotImplementedError

    def runs_in(self, loaded: "Loaded") -> str:
        """The runtime and its precision, said in the convention of every figure; empty if times alone say them."""
        return ""

    def predictor(self) -> "type[Predictor]":
        """The settings and the work of `llmq predict` for this family."""
        raise NotImplementedError


class Step(Plugin, Generic[M]):
    """A change to a model: folder in, folder out; the input is never altered.

    `requires` and `leaves` name the states of an artifact (`packed`, `adapter`, `runtime`) before and after the step;
    the recipe loader checks that they fit before anything runs.
    """

    suits: ClassVar[Collection[str]]
    runtimes: ClassVar[Collection[str]] = frozenset({"torch"})
    """The runtimes of the stages that the step takes; a stage in another runtime was exported, and is at its end."""
    requires: ClassVar[Mapping[str, bool]] = {}
    leaves: ClassVar[Mapping[str, bool | str]] = {}
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "calibration"
    """The use of the data. Tasks of the run read training data by default, or else calibration data."""
    writes: ClassVar[float] = 1.0
    """The bytes that the step writes for each byte of the weights before it."""
    in_every_process: ClassVar[bool] = False
    """True for a step that shares its work among the processes of a run; the first process does all other steps."""
    is_led: ClassVar[bool] = False
    """True where the first process applies a shared step, and asks the others (`together`); else each applies it."""

    @property
    def left(self) -> "Mapping[str, bool | str]":
        """The states after the step: `leaves`, unless settings decide otherwise."""
        return self.leaves

    def check_base(self, base: "Artifact[M]") -> None:
        """Raise `UserError` for a base that the step cannot change; called before the first step."""

    def check_after(self, steps: "Sequence[Step]") -> None:
        """Raise `UserError` if the steps before leave weights, by their settings, that this step cannot take."""

    @property
    def calibration_windows(self) -> tuple[int, int]:
        """The windows of text that the step calibrates on, and the tokens of each; none without a calibration."""
        return 0, 0

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The stage that the step will make of the one before, and the work of making it."""
        from llmq.sketch import nothing_known

        return nothing_known(before, self.word)

    def space(self, artifact: "Artifact[M]") -> int:
        """The approximate bytes that the step writes, checkpoints included; they must be free before."""
        return int(self.writes * sum(file.stat().st_size for file in artifact.weight_files()))

    def apply(self, artifact: "Artifact[M]", folder: Path, context: Context) -> "Artifact":
        """Write the changed model into `folder` (empty, or with leftovers of a killed run) and return the artifact."""
        raise NotImplementedError


class Task(Plugin, Generic[M]):
    """A question to a model. It overrides at least one of `score`, `against` and `clocks`."""

    suits: ClassVar[Collection[str]]
    shapes: ClassVar[frozenset[str]] = frozenset()
    """The shapes of examples that the task reads; empty for all shapes."""
    in_every_process: ClassVar[bool] = False
    """True for a task that shares its questions among the processes of a run."""

    @property
    def name(self) -> str:
        """The name in its measurements: `perplexity`."""
        return self.word.rpartition(".")[2]

    @property
    def figures_of(self) -> tuple[str, ...]:
        """The names that measurements of the task can have: `name`, or the names of the tasks behind this one."""
        return (self.name,)

    def depends(self) -> "Mapping[str, object] | None":
        """Facts that decide the answers besides the settings, their `Data` and the model.

        Called before anything is opened; raises `UserError` for missing data. Answers of a task that returns facts are
        kept for other runs (`answers`); those of a task that returns None are not.
        """
        return None

    def check_base(self, base: "Artifact[M]") -> None:
        """Raise `UserError` for data that does not suit the model; called before the first step."""

    def foresee(self, stage: "Sketch") -> "Work":
        """The work of answering about one stage, with all that is timed."""
        from llmq.sketch import Work

        return Work(unknown=f"{self.word} does not foretell what it takes")

    def foresee_against(self, stage: "Sketch", base: "Sketch") -> "Work":
        """The work of `against`, of a stage beside the base; none for a task that compares nothing."""
        from llmq.sketch import Work

        return Work()

    def score(self, loaded: "Loaded[M]") -> "Iterable[Answer]":
        """Answer about one stage that is open alone."""
        return ()

    def against(self, loaded: "Loaded[M]", base: "Loaded[M]") -> "Iterable[Answer]":
        """Answer about a stage beside the stage that all are compared with; both are open, and they differ."""
        return ()

    def clocks(self, loaded: "Loaded[M]") -> "Iterable[Clock]":
        """Units of work to be timed, in turn with those of every other stage."""
        return ()


@dataclass(frozen=True)
class Split:
    """Training and held-out examples, which share nothing, with counts of the rows that were used or left out."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    shape: str
    counts: Mapping[str, int]
    sha256: str
    classes: tuple[str, ...] = ()
    """The names of the classes, by label; empty without labels."""
    unused: tuple[str, ...] = ()
    """Columns of the data that no example uses."""
    pixel_size: float | None = None
    """The side of a pixel of the images, of high-resolution ones in pairs, in micrometres; None if unknown."""
    apart: float | None = None
    """The distance of successive held-out slices in pixels of `pixel_size`; None where they are no volume."""
    neighbours: bool = False
    """True where held-out slices lie side by side in a volume: what is measured on them is no independent sample."""


@dataclass(frozen=True)
class Expected:
    """The amount of data, known without reading: examples, pixels of an image as the network gets it, characters."""

    train: int
    held_out: int
    pixels: int = 0
    characters: tuple[int, int] = (0, 0)
    """Of the text to learn from, and of the text held out."""

    def windows(self, part: str, window: int, stride: int) -> int:
        """The windows of tokens in a part, at four characters a token."""
        characters = self.characters[1] + (self.characters[0] if part == "all" else 0)
        tokens = characters // 4
        return max(1, -(-max(0, tokens - window) // stride) + 1) if characters else 0


class Data(Plugin):
    """A source of examples for the kinds of models that it suits."""

    suits: ClassVar[Collection[str]]
    shapes: ClassVar[frozenset[str]] = frozenset()
    """The possible shapes of the examples; empty if only reading tells."""

    @classmethod
    def takes(cls, path: str) -> bool:
        """True if a bare path in a recipe means this data with that `path`."""
        return False

    def expected(self) -> Expected | None:
        """The amount of data where it is known without reading; None where only reading tells."""
        return None

    def read(self) -> Split:
        """All rows, checked. Raises `UserError` naming file, line and column of the first bad one."""
        raise NotImplementedError


SCHEMA_VERSION = 2
"""Version 1 had no `exact`: a standard error of 0 meant that a figure was counted (see `Measurement.of`)."""


def in_points(unit: str) -> bool:
    """True for a unit whose differences are told in percentage points."""
    return unit in ("share", "probability") or unit.startswith("share ")


@dataclass(frozen=True)
class Samples:
    """The per-sample scores behind a figure, in an order that is the same for every stage.

    The figure is the sum of `values` over the sum of `weights` (`mean`), its exponential (`exp`), or a quantile of the
    values (`quantile`). Without weights each sample weighs 1. `clusters` numbers the document of each sample where
    several share one: then whole documents are resampled. `ids` names the document of each sample: two stages are
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

    `exact` says that the figure was counted, not sampled (bytes, parameters); no standard error can say so. Raises
    `LlmqError` for a figure, a standard error or a sample that is no finite number.
    `chance` is the score of blind guessing, where that is known: 1 in 4 choices, or the size of a vocabulary.
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

    @classmethod
    def of(cls, data: JsonObject) -> "Measurement":
        """The figure in its JSON. Raises `KeyError` or `TypeError` for any other entry.

        Before schema version 2 an entry has no `exact`: a single count had a standard error of 0 and no samples.
        """
        for name in ("task", "metric", "unit", "better", "convention"):
            if not isinstance(data[name], str):
                raise TypeError(f"{name!r} of a measurement is no text")
        if data["better"] not in get_args(Better):
            raise TypeError(f"{data['better']!r} is no direction of a measurement")
        old = "exact" not in data
        exact = data["stderr"] == 0 and data["n"] == 1 and not data.get("samples") if old else data["exact"]
        if samples := data.get("samples"):
            tuples = {k: tuple(samples[k]) for k in ("values", "weights", "clusters", "ids") if samples.get(k)}
            if len({len(values) for values in tuples.values()}) > 1:
                raise TypeError(f"the samples of {data['metric']!r} have parts of unlike length")
            samples = Samples(**{**samples, **tuples})
        return cls(**{**data, "samples": samples, "exact": exact})


@dataclass(frozen=True)
class Exhibit:
    """The output of a stage for one input, to look at. The report sets the stages side by side.

    `picture` is a PNG; the pipeline keeps it as a file of the run and puts its path in `file`. `panels` names views of
    one scene that lie side by side in the picture, all of one width; the page slides from one to the next.
    """

    task: str
    title: str
    input: str
    output: str = ""
    reference: str = ""
    picture: bytes = field(default=b"", compare=False, repr=False)
    file: str = ""
    panels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "panels", tuple(self.panels))  # JSON has lists


@dataclass(frozen=True)
class Attachment:
    """A file for other tools, which a task leaves in the folder of a stage."""

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
class Workload:
    """The work that a model is timed at, tokens for a language model and images for others, and the task that asks."""

    task: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int


@dataclass(frozen=True)
class Clock:
    """One unit of work to be timed, and the figures read off its time."""

    task: str
    run: Callable[[], None]
    readings: tuple[Reading, ...]
    convention: str
    warmup: int = 2
    rounds: int = 10


@dataclass
class Loaded(Generic[M_co]):
    """An artifact opened on a device: the network, and the tokenizer or the transform that makes inputs."""

    module: Any
    processor: Any
    device: str
    artifact: "Artifact[M_co]"

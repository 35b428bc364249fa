"""A model that is not there yet: its tensors, and the work of steps and tasks on it. Pure arithmetic."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Self

BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "int64": 8}
"""The bytes of a number of each dtype."""
IN_FILES = {"float32": "F32", "int32": "I32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8",
            "int64": "I64"}  # fmt: skip
"""The names of dtypes in safetensors files."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; `name` ends the name of the part."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Part:
    """A parameter of a model, plain or packed: the tensors in files, and the bytes in memory."""

    name: str
    shape: tuple[int, ...]
    """That of the parameter unpacked: `(outputs, inputs)` of a linear layer."""
    role: str = "other"
    """`linear` of a block, `head`, `embedding`, `adapter`, `buffer` (which no gradient changes), or `other`."""
    dtype: str = "float32"
    """The dtype of the products."""
    stored: tuple[Stored, ...] = ()
    opened: int = 0
    packed: bool = False
    mapped: int = 0
    """Bytes of the file that stay in memory, mapped, where a kernel has a copy of its own."""
    on_grid: bool = False
    """True for floats that lie on a grid of 4 bits or fewer, which is kept beside them."""

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...], dtype: str, role: str = "other") -> "Part":
        """A parameter that is stored and opened as it is."""
        return cls(name, shape, role, dtype, (Stored("", dtype, shape),), prod(shape) * BYTES[dtype])

    @property
    def weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Sketch:
    """A stage as foretold from configuration alone."""

    parts: tuple[Part, ...]
    dtype: str
    runtime: str = "torch"
    more_on_disk: int = 0
    """Bytes of the files besides tensors and headers."""
    not_in_order: str = ""
    """The reason why the bytes on disk are not known to the byte; empty if they are."""
    unknown: str = ""
    """The reason why nothing can be said of the size; empty if it is known."""

    @property
    def parameters(self) -> int:
        """The parameters as they multiply: packed ones unpacked."""
        return sum(part.weights for part in self.parts if part.role != "buffer")

    @property
    def on_disk(self) -> int:
        """The bytes of the files of the weights and of the adapter."""
        adapter = [part for part in self.parts if part.role == "adapter"]
        others = [part for part in self.parts if part.role != "adapter"]
        return sum(of_file(group) for group in (others, adapter) if group) + self.more_on_disk

    @property
    def in_memory(self) -> int:
        return sum(part.opened for part in self.parts)

    @property
    def mapped(self) -> int:
        """The bytes of files that stay in memory beside what kernels made of them."""
        return sum(part.mapped for part in self.parts)

    @property
    def packed(self) -> bool:
        return any(part.packed for part in self.parts)

    def rewritten(self, made: "Sketch", changed: Iterable[str], windows: int, length: int, gathers: bool) -> "Work":
        """The work of changing some parts one by one, by a calibration on `windows` of `length` tokens if there is one.

        `gathers` says that the change needs the products of each layer's inputs.
        """
        return Work(2 * self.in_memory, {"copy": 8.0 * self.in_memory})

    def timed(self, prompt_tokens: int, new_tokens: int, batch_size: int) -> "Work":
        """The units of work by which the family is timed, each once."""
        return Work(unknown="nobody says what is timed of this kind of model")

    def with_parts(self, changed: Mapping[str, Part]) -> Self:
        """The sketch with some parts in place of those of the same name."""
        return replace(self, parts=tuple(changed.get(part.name, part) for part in self.parts))


def of_file(parts: "list[Part]") -> int:
    """The bytes of a safetensors file: the length of the header, the header, padded to 8 bytes, and the tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in parts:
        for tensor in part.stored:
            entries[part.name + tensor.name] = {
                "dtype": IN_FILES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.bytes],
            }
            at += tensor.bytes
    header = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + at


Unit = tuple[Callable[[], object], float]
"""A unit of work, and its operations or bytes."""


@dataclass(frozen=True)
class Trial:
    """A kind of work that this machine does for a moment, at the real shapes, to tell its rate; known by its name."""

    name: str
    unit: Callable[[str], Unit] = field(compare=False, repr=False)
    """The device -> a unit of the work there."""

    def __str__(self) -> str:
        return self.name


Kind = str | Trial
"""A kind of work: one that `rates` knows by its word, or a trial."""


@dataclass(frozen=True)
class Work:
    """What a step or a task takes: memory above the process without a model, operations by kind, time besides."""

    memory: int = 0
    operations: Mapping[Kind, float] = field(default_factory=dict)
    """Kind of work -> operations, or bytes moved."""
    seconds: float = 0.0
    disk: int = 0
    """Bytes that are written and gone again, such as checkpoints."""
    unknown: str = ""
    """The reason why memory or time cannot be foretold; empty if both can."""
    passing: int = 0
    """Bytes of the memory that are pages of files read once, which the system drops where it needs the room."""

    @property
    def needed(self) -> int:
        """The bytes without which the work ends for lack of memory."""
        return self.memory - self.passing

    def plus(self, other: "Work") -> "Work":
        """The work of both, one after the other."""
        highest = max(self, other, key=lambda work: work.memory)
        kinds = {*self.operations, *other.operations}
        return Work(
            highest.memory,
            {kind: self.operations.get(kind, 0) + other.operations.get(kind, 0) for kind in kinds},
            self.seconds + other.seconds,
            max(self.disk, other.disk),
            "; ".join(dict.fromkeys(filter(None, (self.unknown, other.unknown)))),
            highest.passing,
        )


def times(work: Work, count: float) -> Work:
    """The same work `count` times."""
    return replace(work, operations={kind: ops * count for kind, ops in work.operations.items()})


def changes(*settings: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The settings that save memory, each on top of those before."""
    so_far: dict[str, object] = {}
    for more in settings:
        so_far |= more
        yield dict(so_far)


def nothing_known(before: Sketch, word: str) -> tuple[Sketch, Work]:
    """The answer of a step that foretells nothing."""
    why = f"{word} does not foretell what it makes"
    return replace(before, parts=(), unknown=before.unknown or why), Work(unknown=why)

"""Many values as pieces of bytes: the latest in memory, earlier ones in a file without a name."""

import marshal
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar, overload

from llmq.errors import LlmqError

T = TypeVar("T")
IN_MEMORY = 4 * 2**20
"""Bytes; a data set of fewer never touches the disk."""


class Pieces:
    """Pieces in the order in which they were added. In memory a million pieces take 8 MB, whatever the size of each."""

    def __init__(self) -> None:
        self._borders = array("q", [0])  # piece i lies from border i to the next
        self._recent = bytearray()
        self._file: IO[bytes] | None = None
        self._written = 0  # bytes in the file

    def __len__(self) -> int:
        return len(self._borders) - 1

    def add(self, piece: bytes) -> None:
        self._recent += piece
        self._borders.append(self._borders[-1] + len(piece))
        if len(self._recent) > IN_MEMORY:
            self._write()

    def __getitem__(self, number: int) -> bytes:
        return self._between(self._borders[number], self._borders[number + 1])

    def joined(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """The bytes of the pieces with these numbers; pieces that follow one another come joined."""
        start = end = 0
        for number in numbers:
            if self._borders[number] != end or end - start > IN_MEMORY:
                yield self._between(start, end)
                start = self._borders[number]
            end = self._borders[number + 1]
        yield self._between(start, end)

    def _between(self, start: int, end: int) -> bytes:
        if start >= self._written:
            return bytes(self._recent[start - self._written : end - self._written])
        if end > self._written:
            return self._between(start, self._written) + self._between(self._written, end)
        assert self._file
        # A position of its own for each reader: a training's worker processes share the file.
        return os.pread(self._file.fileno(), end - start, start)

    def _write(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the pieces
            self._file.write(self._recent)
            self._file.flush()
        except OSError as error:
            raise LlmqError(
                f"{tempfile.gettempdir()!r}, where rows are kept while they are used, cannot be written: "
                f"{error.strerror or error}; set TMPDIR to a folder with room"
            ) from None
        self._written += len(self._recent)
        self._recent.clear()


class Kept(Sequence[T]):
    """Plain values, of which a million need little memory: every access makes a value anew."""

    def __init__(self, values: Iterable[Any] = (), made: Callable[[Any], T] = lambda value: value):
        self._pieces = Pieces()
        self._numbers: Sequence[int] = array("I")  # a part shares the pieces of the whole
        self._made = made
        for value in values:
            self.keep(value)

    def keep(self, value: Any) -> None:
        """Append a value of lists, dicts, texts and numbers."""
        self._numbers.append(len(self._pieces))  # type: ignore[attr-defined]
        self._pieces.add(marshal.dumps(value))

    def part(self, numbers: Sequence[int]) -> "Kept[T]":
        """The values with these numbers; nothing is copied."""
        chosen: Kept[T] = Kept((), self._made)
        chosen._pieces, chosen._numbers = self._pieces, numbers
        return chosen

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self._at(number) for number in self._numbers[at]]
        return self._at(self._numbers[at])

    def __iter__(self) -> Iterator[T]:
        return map(self._at, self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _at(self, number: int) -> T:
        return self._made(marshal.loads(self._pieces[number]))

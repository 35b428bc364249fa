"""Many token sequences as one row in which what they share stands once. Pure: lists in, lists out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

TILE = 128
"""Queries of one piece at most, so that little is computed of what lies in their future."""


@dataclass(frozen=True)
class Piece:
    """A run of new tokens: `row[start : start + length]`, at positions from `first` on, seeing `keys` up to its own."""

    start: int
    first: int
    length: int
    keys: tuple[int, ...]
    """Where in the row each token of the sequence stands, from its beginning to the end of this run."""


@dataclass
class Row:
    """Sequences laid out in one row; `places[i][j]` is where token j of sequence i stands."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    places: list[tuple[int, ...]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    """Which sequences these are, as indices into what was laid out."""

    def add(self, member: int, sequence: Sequence[int], shared: int) -> None:
        """Append a sequence that has its first `shared` tokens in common with the one before."""
        before = self.places[-1][:shared] if shared else ()
        start = len(self.ids)
        places = (*before, *range(start, start + len(sequence) - shared))
        self.ids += sequence[shared:]
        self.positions += range(shared, len(sequence))
        for first in range(shared, len(sequence), TILE):
            end = min(first + TILE, len(sequence))
            self.pieces.append(Piece(start + first - shared, first, end - first, places[:end]))
        self.places.append(places)
        self.members.append(member)


def rows(sequences: Sequence[Sequence[int]], tokens: int, most: int | None = None) -> Iterator[Row]:
    """Every sequence in one of several rows of at most `tokens` tokens and `most` sequences, like beside like.

    A sequence longer than a row has one to itself. Sequences in order of their tokens have next to them the one that
    they share most with; no two rows share anything.
    """
    row, before = Row(), ()
    for member in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[member]
        shared = common(before, sequence)
        full = len(row.ids) + len(sequence) - shared > tokens or len(row.members) == most
        if full and row.members:
            yield row
            row, shared = Row(), 0
        row.add(member, sequence, shared)
        before = sequence  # type: ignore[assignment]
    if row.members:
        yield row


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))

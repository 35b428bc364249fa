"""Many token sequences as one row, in which a shared beginning stands once. Pure: lists in, lists out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

TILE = 128
"""The most queries of one piece: attention computes for a query the keys up to the end of the piece."""


@dataclass(frozen=True)
class Piece:
    """A run of new tokens: `row[start : start + length]`, at positions from `first` on, seeing `keys` up to its own."""

    start: int
    first: int
    length: int
    keys: tuple[int, ...]
    """The places of the sequence's tokens in the row, from the first token to the end of this run."""


@dataclass
class Row:
    """Sequences laid out in one row; `places[i][j]` is where token j of sequence i stands."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    places: list[tuple[int, ...]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    """The number of each sequence among all that are laid out."""

    def add(self, member: int, sequence: Sequence[int], shared: int) -> None:
        """Append a sequence that shares the first `shared` tokens with the sequence before."""
        before = self.places[-1][:shared] if shared else ()  # these tokens stand in the row already
        start = len(self.ids)
        places = (*before, *range(start, start + len(sequence) - shared))
        self.ids += sequence[shared:]
        self.positions += range(shared, len(sequence))  # counted in the sequence, not in the row
        for first in range(shared, len(sequence), TILE):
            end = min(first + TILE, len(sequence))
            self.pieces.append(Piece(start + first - shared, first, end - first, places[:end]))
        self.places.append(places)
        self.members.append(member)


def rows(sequences: Sequence[Sequence[int]], tokens: int, most: int | None = None) -> Iterator[Row]:
    """All sequences, in rows of at most `tokens` tokens and `most` sequences, like beside like.

    A longer sequence has a row to itself. In the order of the tokens each sequence stands beside the one with the
    longest shared beginning. Rows share no tokens.
    """
    row, before = Row(), ()
    # Sorted by tokens, sequences with one beginning are neighbours.
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
    """The number of tokens that two sequences share at their beginnings."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))

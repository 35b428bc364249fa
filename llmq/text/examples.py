"""Examples of token ids, packed into the rows of a batch so that none sees another."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    pass

IGNORED = -100
"""The label that PyTorch's cross-entropy skips."""


@dataclass(frozen=True)
class Tokens:
    """One example: token ids, and for each token whether the model learns to say it."""

    ids: tuple[int, ...]
    said: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> list[int]:
        """The token to predict at each position (shifted already), or `IGNORED`."""
        following = zip(self.ids[1:], self.said[1:], strict=True)
        return [token if said else IGNORED for token, said in following] + [IGNORED]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first that is said."""
        return self.ids[: self.said.index(True)] if True in self.said else self.ids

    def cut(self, start: int, end: int) -> Tokens:
        """The tokens from `start` to `end` as an example of their own."""
        return Tokens(self.ids[start:end], self.said[start:end])


@dataclass(frozen=True)
class Packed(Sequence[list[Tokens]]):
    """Rows of examples: row i has the examples whose numbers stand between border i and border i + 1."""

    examples: Sequence[Tokens]
    numbers: Sequence[int]  # indices into `examples`, row after row
    borders: Sequence[int]  # (rows + 1,), the first is 0

    def __len__(self) -> int:
        return len(self.borders) - 1

    @overload
    def __getitem__(self, at: int) -> list[Tokens]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[Tokens]]: ...
    def __getitem__(self, at: int | slice) -> list[Tokens] | list[list[Tokens]]:
        if isinstance(at, slice):
            return [self[row] for row in range(*at.indices(len(self)))]
        at = range(len(self))[at]  # an IndexError ends a loop over the rows
        return [self.examples[i] for i in self.numbers[self.borders[at] : self.borders[at + 1]]]


def alone(examples: Sequence[Tokens]) -> Packed:
    """Each example in a row of its own."""
    return Packed(examples, range(len(examples)), range(len(examples) + 1))


def pack(examples: Sequence[Tokens], length: int) -> Packed:
    """Examples shared out to rows of at most `length` tokens: longest first, into the fullest row with room."""
    sizes = array("I", map(len, examples))
    rows: list[array[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> rows
    for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):  # stable: equal sizes keep their order
        size = sizes[i]
        left = next((room for room in range(size, length + 1) if with_room.get(room)), None)
        if left is None:
            rows.append(array("I"))
            row, left = len(rows) - 1, length
        else:
            row = with_room[left].pop()
        rows[row].append(i)
        with_room.setdefault(left - size, []).append(row)
    borders = array("I", accumulate(map(len, rows), initial=0))
    return Packed(examples, array("I", chain.from_iterable(rows)), borders)


@dataclass(frozen=True)
class Collator:
    """Rows of examples -> the tensors of a batch, each (rows, tokens of the longest row).

    `position_ids` begin anew at each example; the padding at a row's end is an example of its own without labels.
    `labels` are aligned with the logits that predict them (`shift_labels` of transformers). `tokens` counts the tokens
    without padding. `segments` has the places of the examples and of the padding (`attention.segments_of`).
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Sequence[Tokens]]) -> dict[str, Any]:
        import torch

        used = [sum(map(len, row)) for row in rows]  # tokens of each row
        width = max(used)
        ids, positions, labels, parts = [], [], [], []
        for row, length in zip(rows, used, strict=True):
            padding = width - length
            ids.append([t for e in row for t in e.ids] + [self.pad_token_id] * padding)
            parts.append([n for n in (*map(len, row), padding) if n])  # tokens of each example, and of the padding
            positions.append([p for n in parts[-1] for p in range(n)])
            labels.append([label for e in row for label in e.labels()] + [IGNORED] * padding)
        aligned = torch.tensor(labels)
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(positions),
            "labels": aligned,
            "shift_labels": aligned,  # with these given, transformers does not shift `labels`
            "tokens": sum(used),
            "segments": [
                (row, *span) for row, lengths in enumerate(parts) for span in pairwise(accumulate(lengths, initial=0))
            ],
        }

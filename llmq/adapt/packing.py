"""Examples -> rows of a batch, several to a row, none seeing another."""

from collections.abc import Sequence
from typing import Any

from llmq.data.tokens import IGNORED, Tokens


def pack(examples: Sequence[Tokens], length: int) -> list[list[Tokens]]:
    """Examples shared out to rows of at most `length` tokens: longest first, into the fullest row that has room."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    rows: list[list[Tokens]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> rows
    for i in order:
        size = len(examples[i])
        left = next((room for room in range(size, length + 1) if with_room.get(room)), None)
        if left is None:
            rows.append([])
            row, left = len(rows) - 1, length
        else:
            row = with_room[left].pop()
        rows[row].append(examples[i])
        with_room.setdefault(left - size, []).append(row)
    return rows


class Collator:
    """Rows of examples -> the tensors of a batch, each (rows, tokens of the longest row).

    `position_ids` begin anew at each example; the padding at a row's end is an example of its own that nothing is
    learned from. `labels` are aligned with the logits that predict them (`shift_labels` of transformers). `tokens` is
    how many there are without padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Sequence[Tokens]]) -> dict[str, Any]:
        import torch

        width = max(sum(map(len, row)) for row in rows)
        ids, positions, labels = [], [], []
        for row in rows:
            used = sum(map(len, row))
            padding = width - used
            lengths = [*map(len, row), padding]
            ids.append([t for e in row for t in e.ids] + [self.pad_token_id] * padding)
            positions.append([p for n in lengths for p in range(n)])
            labels.append([label for e in row for label in e.labels()] + [IGNORED] * padding)
        aligned = torch.tensor(labels)
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor(positions),
            "labels": aligned,
            "shift_labels": aligned,
            "tokens": torch.tensor(sum(len(e) for row in rows for e in row)),
        }

"""What the text data sets share: recognising the shape of rows, checking them, splitting them.

A checked row is one of `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmq.errors import UserError, did_you_mean
from llmq.files import sha256_text
from llmq.types import Split

Row = dict[str, Any]

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "text": ("text",),
}
"""Shape -> the columns that it must have, tried in this order."""


def check(rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], source: str) -> tuple[list[Row], str]:
    """Checked rows and their shape, from `(where, raw row)` pairs.

    `columns` maps our names to the file's: `{"prompt": "query"}`. Raises `UserError` with place and column.
    """
    checked: list[Row] = []
    shape = ""
    for where, raw in rows:
        if not isinstance(raw, dict):
            raise UserError(f"{where}: a row is a JSON object with named columns, not {type(raw).__name__}")
        row = {**raw, **{ours: raw.get(theirs) for ours, theirs in columns.items()}}
        if not shape:
            missing = [theirs for theirs in columns.values() if theirs not in raw]
            if missing:
                raise UserError(f"{where}: there is no column {missing[0]!r}{did_you_mean(missing[0], raw)}")
            # Columns that were named decide the shape, whatever else the file has.
            shape = recognise({k: row[k] for k in columns}, where, strict=False) or recognise(row, where)
        checked.append(BUILDERS[shape](row, where))
    if not checked:
        raise UserError(f"{source}: no rows")
    return checked, shape


def recognise(row: Mapping[str, Any], where: str, strict: bool = True) -> str:
    """The shape of a row by its columns; empty, or `UserError` if `strict`, where it has none."""
    for shape, needed in SHAPES.items():
        if all(column in row for column in needed):
            return shape
    if not strict:
        return ""
    raise UserError(
        f"{where}: columns {', '.join(map(repr, row))} are none of {'; '.join(SHAPES)}; "
        "name yours with columns: {prompt: …, completion: …}"
    )


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {json.dumps(value, default=str)}, not text")
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _messages(row: Mapping[str, Any], where: str) -> Row:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: column 'messages' is not a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise UserError(f"{where}: message {i} of column 'messages' needs a role: system, user, assistant or tool")
        _string(message, "content", f"{where}: message {i}")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: column 'messages' has no assistant message to learn from")
    return {"messages": messages}


def _dialogue(user: str, assistant: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _instruction(row: Mapping[str, Any], where: str) -> Row:
    context = f"\n\n{row['input']}" if row.get("input") else ""
    return _dialogue(_string(row, "instruction", where) + context, _string(row, "output", where))


BUILDERS: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "messages": _messages,
    "prompt/completion": lambda r, w: {k: _string(r, k, w) for k in ("prompt", "completion")},
    "instruction/input/output": _instruction,
    "question/answer": lambda r, w: _dialogue(_string(r, "question", w), _string(r, "answer", w)),
    "text": lambda r, w: {"text": _string(r, "text", w)},
}


def split(rows: Sequence[Row], shape: str, held_out: float, limit: int | None) -> Split:
    """Set a share of the rows aside by the hash of their content, so that equal rows fall on one side."""
    used = rows if limit is None else rows[:limit]
    keys = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest() for row in used]
    order = sorted(keys)
    # At least one on either side.
    wanted = min(max(1, round(held_out * len(used))), len(used) - 1) if held_out and len(used) > 1 else 0
    border = order[wanted - 1] if wanted else ""
    if border == order[-1]:  # so many are alike that all would be held out
        border = ""
    return make_split(
        [row for row, key in zip(used, keys, strict=True) if key > border],
        [row for row, key in zip(used, keys, strict=True) if key <= border],
        shape,
        {"over_the_limit": len(rows) - len(used)},
    )


def make_split(train: Sequence[Row], held_out: Sequence[Row], shape: str, skipped: Mapping[str, int]) -> Split:
    """A `Split` with its counts and hash."""
    counts = {
        "read": len(train) + len(held_out) + sum(skipped.values()),
        "train": len(train),
        "held_out": len(held_out),
        **skipped,
    }
    digest = sha256_text(*(json.dumps(row, sort_keys=True) for rows in (train, held_out) for row in rows))
    return Split(train, held_out, shape, counts, digest)

"""What the text data sets share: recognising the shape of rows, checking them, splitting them.

A checked row is one of `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`, the last perhaps with `tools` and
`chat_template_kwargs`. A text that `continues` the one before is the rest of the same document.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmq.data import messages as chat
from llmq.data.strict_json import shown, why_not_plain
from llmq.errors import UserError, did_you_mean
from llmq.files import sha256_text
from llmq.types import Split

Row = dict[str, Any]

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "conversations": ("conversations",),
    "text": ("text",),
}
"""Shape -> the columns that it must have, tried in this order."""

SYSTEM = ("system", "system_prompt")
TURNS = (*SYSTEM, "history", "tools", "functions", "chat_template_kwargs")
"""Columns that change what a conversation means, whatever its shape."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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
            shape = _shape(row, raw, columns, where)
        made = BUILDERS[shape](row, where)
        if why := why_not_plain(made):
            column = next((c for c in made if why_not_plain(made[c])), shape)
            raise UserError(f"{where}: column {column!r} cannot be used: {why}")
        checked.append(made)
    if not checked:
        raise UserError(f"{source}: no rows")
    return checked, shape


def _shape(row: Row, raw: Row, columns: Mapping[str, str], where: str) -> str:
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        near = did_you_mean(missing[0], [name for name in raw if name.isprintable()])
        raise UserError(f"{where}: there is no column {missing[0]!r}{near}")
    # Columns that were named decide the shape, whatever else the file has.
    named = recognise({k: row[k] for k in columns}, where, strict=False)
    if not named:
        _refuse_preferences(row, where)
    return named or recognise(row, where)


def _refuse_preferences(row: Mapping[str, Any], where: str) -> None:
    """Answers to be avoided must not be learned by oversight."""
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' are preferences, which llmq does not train on; "
            "to learn what was chosen: columns: {completion: chosen}, or {messages: chosen}"
        )
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise UserError(
            f"{where}: 'label' says which completions are bad, and llmq does not train on such feedback; "
            "keep the good rows, or name the columns: {prompt: prompt, completion: completion}"
        )


def recognise(row: Mapping[str, Any], where: str, strict: bool = True) -> str:
    """The shape of a row by its columns; empty, or `UserError` if `strict`, where it has none."""
    for shape, needed in SHAPES.items():
        if all(column in row for column in needed):
            return shape
    if not strict:
        return ""
    names = ", ".join(repr(name[:24]) for name in list(row)[:12]) + (", …" if len(row) > 12 else "")
    raise UserError(
        f"{where}: columns {names} are none of {'; '.join(SHAPES)}; "
        "name yours with columns: {prompt: …, completion: …}"
    )


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {shown(value)}, not text")
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _conversation(
    row: Mapping[str, Any], messages: list[chat.Message], where: str, column: str, history: bool = False
) -> Row:
    """A conversation with what the row's other columns say of it: a system turn, tools, settings of the template."""
    for media in MEDIA:
        if row.get(media):
            raise UserError(f"{where}: column {media!r}: a language model reads text only; take the column out")
    if history:
        messages = [*chat.history_of(row.get("history"), where), *messages]
    for name in SYSTEM:
        if row.get(name):
            said = _string(row, name, where)
            if any(m["role"] == "system" for m in messages) and messages[0] != {"role": "system", "content": said}:
                raise UserError(f"{where}: a system turn stands in column {name!r} and in {column!r}; keep one")
            messages = [{"role": "system", "content": said}, *(m for m in messages if m["role"] != "system")]
    chat.check_learned(messages, column, where)
    made: Row = {"messages": messages}
    if tools := chat.tools_of(row, where):
        made["tools"] = tools
    if settings := chat.parsed(row.get("chat_template_kwargs"), f"{where}: column 'chat_template_kwargs'"):
        if not isinstance(settings, dict):
            raise UserError(f"{where}: column 'chat_template_kwargs' is {shown(settings)}, not an object")
        made["chat_template_kwargs"] = settings
    return made


def _messages(column: str) -> Callable[[Mapping[str, Any], str], Row]:
    return lambda row, where: _conversation(row, chat.messages_of(row.get(column), column, where), where, column)


def _dialogue(row: Mapping[str, Any], user: str, assistant: str, where: str, column: str) -> Row:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return _conversation(row, turns, where, column, history=True)


def _instruction(row: Mapping[str, Any], where: str) -> Row:
    context = f"\n\n{_string(row, 'input', where)}" if row.get("input") else ""
    asked = _string(row, "instruction", where) + context
    return _dialogue(row, asked, _string(row, "output", where), where, "output")


def _pair(row: Mapping[str, Any], where: str) -> Row:
    """A prompt and its completion: two texts, or two lists of messages, of which the second's are learned."""
    if isinstance(row.get("prompt"), list):
        prompt, completion = (chat.messages_of(row.get(c), c, where) for c in ("prompt", "completion"))
        asked = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
        return _conversation(row, [*asked, *completion], where, "completion")
    for column in (*TURNS, *MEDIA):
        if row.get(column):
            raise UserError(
                f"{where}: column {column!r} has no place beside a prompt that is plain text; "
                "write prompt and completion as lists of messages, or take the column out"
            )
    return {k: _string(row, k, where) for k in ("prompt", "completion")}


BUILDERS: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "messages": _messages("messages"),
    "conversations": _messages("conversations"),
    "prompt/completion": _pair,
    "instruction/input/output": _instruction,
    "question/answer": lambda r, w: _dialogue(r, _string(r, "question", w), _string(r, "answer", w), w, "answer"),
    "text": lambda r, w: {"text": _string(r, "text", w)},
}


def used_columns(shape: str) -> set[str]:
    """The columns that rows of a shape are made of."""
    alpaca = {"input", "history"} if shape == "instruction/input/output" else set()
    asked = {"history"} if shape == "question/answer" else set()
    turns = set(TURNS) - {"history"} if shape != "text" else set()
    return {*SHAPES[shape], *turns, *alpaca, *asked}


def without_absent_keys(row: Row) -> Row:
    """A row of an Arrow table whose nested objects have only the keys that have a value.

    Such a table gives every row the keys of all rows: a tool without a parameter has that parameter as None.
    """
    return {column: _without_none(value) for column, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def split_of(
    raw: Iterable[tuple[str, Any]], columns: Mapping[str, str], source: str, held_out: float, limit: int | None
) -> Split:
    """Raw rows, checked and split; it says which of their columns were not used."""
    seen: dict[str, None] = {}

    def noted() -> Iterator[tuple[str, Any]]:
        for where, row in raw:
            if isinstance(row, dict):
                seen.update(dict.fromkeys(row))
            yield where, row

    checked, shape = check(noted(), columns, source)
    used = {columns.get(name, name) for name in used_columns(shape)}
    return replace(split(checked, shape, held_out, limit), unused=tuple(name for name in seen if name not in used))


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

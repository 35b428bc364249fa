"""Rows of text: their shapes, their checks and their split.

A checked row is one of `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`, the last perhaps with `tools` and
`chat_template_kwargs`. A text that `continues` the one before is the rest of the same document.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from llmq.errors import UserError, did_you_mean
from llmq.files import sha256_texts
from llmq.guarded.strict_json import why_not_plain
from llmq.text import messages as chat
from llmq.text.pieces import Kept, Pieces
from llmq.types import Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Row = dict[str, Any]
Raw = Mapping[str, object]
"""A row as the file has it."""
AS_JSON = json.JSONEncoder(sort_keys=True, allow_nan=False, check_circular=False).encode  # a circle is a RecursionError

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
    "conversations": ("conversations",),
    "text": ("text",),
}
"""Shape -> the columns that a row of this shape must have, tried in this order."""

SYSTEM = ("system", "system_prompt")
TURNS = (*SYSTEM, "history", "tools", "functions", "chat_template_kwargs")
"""Columns that add to a conversation of any shape."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SAID_OF_TURNS = frozenset((*TURNS, *MEDIA))
HISTORY = {"instruction/input/output": ("input", "history"), "question/answer": ("history",)}
"""Shape -> the further columns that a row of this shape may have."""


class Gathered(Kept[Row]):
    """Rows in the order read, and for a split the JSON text of each; of that text, and of the question, a hash."""

    def __init__(self, rows: Iterable[Row] = ()):
        super().__init__()
        self._texts = Pieces()
        self.keys = array("Q")  # the first 64 bits of each hash
        self.asked = array("Q")
        for row in rows:
            self.add(row, AS_JSON(row))

    def add(self, row: Row, text: str) -> None:
        self.keep(row)
        data = text.encode()
        # The length before each text keeps neighbours apart in the hash.
        self._texts.add(len(data).to_bytes(8, "little") + data)
        self.keys.append(_key(data))
        self.asked.append(_key(_question(row).encode()) or self.keys[-1])

    def sha256(self, numbers: Iterable[int]) -> str:
        """The hash of the rows with these numbers, as `sha256_text` hashes their JSON texts."""
        total = hashlib.sha256()
        for texts in self._texts.joined(numbers):
            total.update(texts)
        return total.hexdigest()


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) if data else 0


def _question(row: Row) -> str:
    """What comes before the last answer of a row; nothing for a text."""
    if "messages" not in row:
        return str(row.get("prompt", ""))
    last = max((i for i, message in enumerate(row["messages"]) if chat.learned(message)), default=0)
    return AS_JSON(row["messages"][:last]) if last else ""


def check(rows: Iterable[tuple[str, object]], columns: Mapping[str, str], source: str) -> tuple[Gathered, str]:
    """Checked rows and their shape, from `(where, raw row)` pairs.

    `columns` maps our names to the file's: `{"prompt": "query"}`. Raises `UserError` with place and column.
    """
    ours = {*chain.from_iterable((*needed, *HISTORY.get(shape, ())) for shape, needed in SHAPES.items()), *TURNS}
    if unknown := next((name for name in columns if name not in ours), None):
        raise UserError(f"{source}: columns: {unknown!r} is no column of ours{did_you_mean(unknown, ours)}")
    checked = Gathered()
    shape = ""
    for where, raw in rows:
        if not isinstance(raw, dict):
            raise UserError(f"{where}: a row is a JSON object with named columns, not {type(raw).__name__}")
        # A column that was named stands in for a column of our name.
        row = {**raw, **{ours: raw.get(theirs) for ours, theirs in columns.items()}} if columns else raw
        if not shape:  # the first row decides for all
            shape = _shape(row, raw, columns, where)
        plain = BUILDERS[shape](row, where)
        checked.add(plain, _text(plain, where, shape))
    if not checked:
        raise UserError(f"{source}: no rows")
    return checked, shape


def _text(row: Row, where: str, shape: str) -> str:
    """A row as JSON text. Raises `UserError` for a value that no JSON file in UTF-8 can hold."""
    try:
        text = AS_JSON(row)
    except (TypeError, ValueError, RecursionError):
        text = ""
    if (not text or "\\ud" in text) and (why := why_not_plain(row)):  # what is not UTF-8 is written as \ud800 to \udfff
        column = next((c for c in row if why_not_plain(row[c])), shape)
        raise UserError(f"{where}: column {column!r} cannot be used: {why}")
    return text


def _shape(row: Raw, raw: Raw, columns: Mapping[str, str], where: str) -> str:
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        near = did_you_mean(missing[0], [name for name in raw if name.isprintable()])
        raise UserError(f"{where}: there is no column {missing[0]!r}{near}")
    # Columns that were named decide the shape, whatever else the file has.
    if shape := _shape_of(columns):
        return shape
    # Answers to be avoided must not be learned by oversight.
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' are preferences, which llmq does not train on; "
            "to learn the chosen replies: columns: {completion: chosen}, or {messages: chosen}"
        )
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise UserError(
            f"{where}: 'label' says which completions are bad, and llmq does not train on such feedback; "
            "keep the good rows, or name the columns: {prompt: prompt, completion: completion}"
        )
    if shape := _shape_of(row):
        return shape
    names = ", ".join(repr(name[:24]) for name in list(row)[:12]) + (", …" if len(row) > 12 else "")
    raise UserError(
        f"{where}: columns {names} are none of {'; '.join(SHAPES)}; "
        "name yours with columns: {prompt: …, completion: …}"
    )


def _shape_of(columns: Iterable[str]) -> str:
    present = set(columns)
    return next((shape for shape, needed in SHAPES.items() if present.issuperset(needed)), "")


def _string(row: Raw, column: str, where: str) -> str:
    value = row.get(column)
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing")
    if not isinstance(value, str):
        raise chat.refused(value, "text", column, where)
    if not value.strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return value


def _conversation(row: Raw, messages: list[chat.Message], where: str, column: str, history: bool = False) -> Row:
    """A row of messages, with the system turn, the tools and the template's settings that other columns hold."""
    if SAID_OF_TURNS.isdisjoint(row):  # nearly all rows
        chat.check_learned(messages, column, where)
        return {"messages": messages}
    for media in MEDIA:
        if row.get(media):
            raise UserError(f"{where}: column {media!r}: a language model reads text only; take the column out")
    if history:
        messages = [*chat.history_of(row.get("history"), where), *messages]
    for name in SYSTEM:
        if row.get(name):
            said = _string(row, name, where)
            # The same system turn in both places is no contradiction.
            if any(m["role"] == "system" for m in messages) and messages[0] != {"role": "system", "content": said}:
                raise UserError(f"{where}: a system turn stands in column {name!r} and in {column!r}; keep one")
            messages = [{"role": "system", "content": said}, *(m for m in messages if m["role"] != "system")]
    chat.check_learned(messages, column, where)
    conversation: Row = {"messages": messages}
    if tools := chat.tools_of(row, where):
        conversation["tools"] = tools
    if settings := chat.parsed(row.get("chat_template_kwargs"), f"{where}: column 'chat_template_kwargs'"):
        if not isinstance(settings, dict):
            raise chat.refused(settings, "an object", "chat_template_kwargs", where)
        conversation["chat_template_kwargs"] = settings
    return conversation


def _messages(column: str) -> Callable[[Raw, str], Row]:
    return lambda row, where: _conversation(row, chat.messages_of(row.get(column), column, where), where, column)


def _dialogue(row: Raw, user: str, assistant: str, where: str, column: str) -> Row:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return _conversation(row, turns, where, column, history=True)


def _instruction(row: Raw, where: str) -> Row:
    context = f"\n\n{_string(row, 'input', where)}" if row.get("input") else ""  # Alpaca: input below instruction
    asked = _string(row, "instruction", where) + context
    return _dialogue(row, asked, _string(row, "output", where), where, "output")


def _pair(row: Raw, where: str) -> Row:
    """A prompt and its completion: two texts, or two lists of messages of which the second is learned."""
    if isinstance(row.get("prompt"), list):
        prompt, completion = (chat.messages_of(row.get(c), c, where) for c in ("prompt", "completion"))
        # Answers within a prompt are given, not to be learned.
        asked = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
        return _conversation(row, [*asked, *completion], where, "completion")
    for column in row:
        if column in SAID_OF_TURNS and row[column]:
            raise UserError(
                f"{where}: column {column!r} has no place beside a prompt that is plain text; "
                "write prompt and completion as lists of messages, or take the column out"
            )
    return {k: _string(row, k, where) for k in ("prompt", "completion")}


BUILDERS: dict[str, Callable[[Raw, str], Row]] = {
    "messages": _messages("messages"),
    "conversations": _messages("conversations"),
    "prompt/completion": _pair,
    "instruction/input/output": _instruction,
    "question/answer": lambda r, w: _dialogue(r, _string(r, "question", w), _string(r, "answer", w), w, "answer"),
    "text": lambda r, w: {"text": _string(r, "text", w)},
}


def used_columns(shape: str) -> set[str]:
    """The columns that rows of a shape are made of."""
    turns = set(TURNS) - {"history"} if shape != "text" else set()
    return {*SHAPES[shape], *turns, *HISTORY.get(shape, ())}


def without_absent_keys(row: Raw) -> Row:
    """A row of an Arrow table whose nested objects have only the keys that have a value.

    Such a table gives every row the keys of all rows: a tool without a parameter has that parameter as None.
    """
    return {column: _without_none(value) for column, value in row.items()}


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def split_of(
    raw: Iterable[tuple[str, object]], columns: Mapping[str, str], source: str, held_out: float, limit: int | None
) -> Split:
    """The checked rows in two parts; `unused` names the columns that the checked rows leave out."""
    seen: dict[str, None] = {}

    def noted() -> Iterator[tuple[str, object]]:
        for where, row in raw:
            if isinstance(row, dict) and not row.keys() <= seen.keys():  # most rows bring no new column
                seen.update(dict.fromkeys(row))
            yield where, row

    checked, shape = check(noted(), columns, source)
    used = {columns.get(name, name) for name in used_columns(shape)}
    return replace(split(checked, shape, held_out, limit), unused=tuple(name for name in seen if name not in used))


def split(rows: Gathered, shape: str, held_out: float, limit: int | None) -> Split:
    """Set a share of the rows aside by the hash of their content; rows with one question fall on one side.

    Where so many have the same question that no such share is near the one wanted, equal rows alone stay together.
    """
    import numpy as np

    its_own = np.asarray(rows.keys)[:limit]  # (rows,)
    # At least one on either side.
    wanted = min(max(1, round(held_out * len(its_own))), len(its_own) - 1) if held_out and len(its_own) > 1 else 0
    aside = _aside(_least(its_own, np.asarray(rows.asked)[:limit]), wanted)
    if not aside.any():
        aside = _aside(its_own, wanted)
    # In the order read.
    sides = [array("I", np.flatnonzero(side).astype(np.uint32).tobytes()) for side in (~aside, aside)]
    train, held = map(rows.part, sides)
    skipped = {"over_the_limit": len(rows) - len(its_own)}
    return Split(train, held, shape, _counts(train, held, skipped), rows.sha256(chain(*sides)))


def _least(keys: "NDArray[np.uint64]", questions: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """For each row the least key of all rows with its question. (rows,)"""
    import numpy as np

    order, firsts = _groups(questions)
    least = np.empty_like(keys)
    least[order] = np.repeat(np.minimum.reduceat(keys[order], firsts), np.diff(firsts, append=len(keys)))
    return least


def _aside(keys: "NDArray[np.uint64]", wanted: int) -> "NDArray[np.bool_]":
    """True for the least keys, of `wanted` rows or up to twice as many; one of more rows is passed over. (rows,)"""
    import numpy as np

    order, firsts = _groups(keys)
    counts = np.diff(firsts, append=len(keys))
    taken: NDArray[np.bool_] = np.zeros(len(counts), np.bool_)
    count = 0
    for i, more in enumerate(counts):
        if count >= wanted:
            break
        if count + more <= 2 * wanted and count + more < len(keys):
            taken[i] = True
            count += int(more)
    aside: NDArray[np.bool_] = np.empty(len(keys), np.bool_)
    aside[order] = np.repeat(taken, counts)
    return aside


def _groups(keys: "NDArray[np.uint64]") -> "tuple[NDArray[np.uint32], NDArray[np.intp]]":
    """The rows by key, and where in this order each key begins."""
    import numpy as np

    order = np.argsort(keys).astype(np.uint32)
    ranked = keys[order]
    return order, np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])


def make_split(train: Sequence[Row], held_out: Sequence[Row], shape: str, skipped: Mapping[str, int]) -> Split:
    """A `Split` of few rows, with counts and hash."""
    digest = sha256_texts(json.dumps(row, sort_keys=True) for row in chain(train, held_out))
    return Split(train, held_out, shape, _counts(train, held_out, skipped), digest)


def _counts(train: Sequence[Row], held_out: Sequence[Row], skipped: Mapping[str, int]) -> dict[str, int]:
    return {
        "read": len(train) + len(held_out) + sum(skipped.values()),
        "train": len(train),
        "held_out": len(held_out),
        **skipped,
    }

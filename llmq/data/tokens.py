"""Checked rows -> token ids, with the mark of what is to be learned or scored."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from llmq.data.conversation import Conversation, Span
from llmq.data.messages import learned
from llmq.data.rows import Row
from llmq.errors import UserError
from llmq.types import Split

IGNORED = -100
"""The label that PyTorch's cross-entropy skips."""
KNOWN_KEYS = {"role", "content", "tool_calls", "reasoning_content", "weight"}
"""Keys of a message that are used, or refused where a template does not know them."""


@dataclass(frozen=True)
class Tokens:
    """One example: token ids, and for each whether the model should say it."""

    ids: tuple[int, ...]
    said: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> list[int]:
        """For each position the token to predict there, aligned (already shifted), or `IGNORED`."""
        following = zip(self.ids[1:], self.said[1:], strict=True)
        return [token if said else IGNORED for token, said in following] + [IGNORED]

    def cut(self, start: int, end: int) -> "Tokens":
        """A part of it, as an example of its own."""
        return Tokens(self.ids[start:end], self.said[start:end])


def encode(row: Row, tokenizer: Any, ends: Iterable[int] = ()) -> Tokens:
    """Token ids of a row: all of a text is said, of a prompt and completion the completion, and one end mark.

    Messages go through the tokenizer's chat template; what the assistant says is said, up to and with its end mark.
    `ends` are the tokens that the model stops at, besides the tokenizer's own end of text.
    """
    return Encoder(tokenizer, frozenset(ends)).encode(row)


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows, under one tokenizer."""

    tokenizer: Any
    ends: frozenset[int] = frozenset()

    def encode(self, row: Row) -> Tokens:
        """See `encode`."""
        text, learned, others = self._parts(row)
        # In one go: a tokenizer may begin every text that it is given with a mark of its own.
        ids, places = with_places(text, self.tokenizer)
        blank = [not text[a:b].strip() and i not in self._special for i, (a, b) in zip(ids, places, strict=True)]
        *turns, last = _tokens_within(places, learned)
        tail, end = self._until_end_mark(ids, blank, last, self._special)
        # What ends the last turn ends the others.
        marks = self._stops | {i for i in ids[tail:end] if i in self._special}
        said = [False] * end
        for turn in (*turns, last):
            stop = min(self._until_end_mark(ids, blank, turn, marks)[1], end)
            said[turn.start : stop] = [True] * (stop - turn.start)
        for turn in _tokens_within(places, others):
            stop = min(self._until_end_mark(ids, blank, turn, marks)[1], end)
            said[turn.start : stop] = [False] * (stop - turn.start)
        said[last.start : end] = [True] * (end - last.start)
        return self._framed(ids[:end], said, is_templated=self._is_templated(row))

    def _framed(self, ids: list[int], said: list[bool], is_templated: bool) -> Tokens:
        """With the tokenizer's mark before it, and an end mark after it, unless they are there."""
        begin = [] if is_templated else beginning(self.tokenizer)
        if ids[:1] != begin:
            ids, said = [*begin, *ids], [*[False] * len(begin), *said]
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] and ids[-1] not in self._stops:
            ids, said = [*ids, end], [*said, True]
        return Tokens(tuple(ids), tuple(said))

    def _until_end_mark(
        self, ids: Sequence[int], blank: Sequence[bool], turn: range, marks: Collection[int]
    ) -> tuple[int, int]:
        """Where the words of a turn end, and where its end mark does: within the turn, or in `marks` right after it.

        Of several end marks the first is kept that the model stops at; blanks after the mark are not said.
        """
        tail = turn.stop
        while tail > turn.start and (blank[tail - 1] or ids[tail - 1] in self._special):
            tail -= 1
        inside = [i for i in range(tail, turn.stop) if ids[i] in self._special]
        stops = [i for i in inside if ids[i] in self._stops]
        if inside:
            return tail, 1 + (stops[0] if stops else inside[-1])
        after = next((i for i in range(turn.stop, len(ids)) if not blank[i]), len(ids))
        return tail, after + 1 if after < len(ids) and ids[after] in marks else turn.stop

    def _parts(self, row: Row) -> tuple[str, list[Span], list[Span]]:
        """The text of a row, where in it stands what is to be said, and turns of the assistant that are not."""
        if self._is_templated(row):
            talk = Conversation(row, self.tokenizer)
            tagged = talk.tagged()
            return talk.text, tagged or list(talk.turns(True)), list(talk.turns(False)) if tagged else []
        pieces = _pieces(row)
        ends = list(accumulate(len(text) for text, _ in pieces))
        said = [(end - len(text), end) for end, (text, is_said) in zip(ends, pieces, strict=True) if is_said]
        return "".join(text for text, _ in pieces), said, []

    def _is_templated(self, row: Row) -> bool:
        return "messages" in row and bool(self.tokenizer.chat_template)

    @cached_property
    def _stops(self) -> frozenset[int]:
        return self.ends | ({self.tokenizer.eos_token_id} - {None})

    @cached_property
    def _special(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return self._stops | {*getattr(self.tokenizer, "all_special_ids", ()), *(i for i in added if added[i].special)}


def with_places(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """The tokens of a text, without marks, and where in it each stands. Raises `UserError` for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", True):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) is a slow one, which does not "
            "say where its tokens stand in the text; save a fast one beside the model (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def _tokens_within(places: Sequence[Span], spans: Sequence[Span]) -> list[range]:
    """The tokens of each span of a text; one that stands in two spans belongs to the later."""
    stops = [stop for _, stop in places]
    return [range(bisect_right(stops, start), bisect_right(stops, end)) for start, end in spans]


def beginning(tokenizer: Any) -> list[int]:
    """The mark that a tokenizer puts before every text (Llama), or nothing (SmolLM2)."""
    marked = tokenizer("")["input_ids"]
    return list(marked[:1]) if marked and marked[0] == tokenizer.bos_token_id else []


def _pieces(row: Row) -> list[tuple[str, bool]]:
    """The texts of a row, and which of them are said; messages are lines."""
    if "text" in row:
        return [(row["text"], True)]
    if "prompt" in row:
        return [(row["prompt"], False), (row["completion"], True)]
    messages = row["messages"]
    of_messages = ("tool_calls", "reasoning_content")
    lost = [*(k for k in row if k != "messages"), *(k for k in of_messages if any(k in m for m in messages))]
    if lost:
        raise UserError(
            f"this tokenizer has no chat template, so that {lost[0]!r} of the rows has no place in the text"
        )
    last = max(i for i, m in enumerate(messages) if learned(m))
    said = [(m["content"], learned(m)) for m in messages[: last + 1]]
    return [*((text + "\n", is_said) for text, is_said in said[:-1]), said[-1]]


def prompt_and_reference(row: Row, tokenizer: Any, ends: Iterable[int] = ()) -> tuple[tuple[int, ...], str]:
    """The tokens before the last thing that the model should say, as in training, and that thing."""
    tokens = encode(row, tokenizer, ends)
    begin = max((i + 1 for i, is_said in enumerate(tokens.said) if not is_said), default=0)
    return tokens.ids[:begin], str(tokenizer.decode(tokens.ids[begin:], skip_special_tokens=True))


def shown_prompt(row: Row) -> str:
    """The last thing that a person wrote, for a reader."""
    if "messages" in row:
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return str(asked[-1] if asked else row["messages"][0]["content"])
    return str(row.get("prompt", ""))


def encode_all(
    rows: Iterable[Row], tokenizer: Any, max_length: int, ends: Iterable[int] = ()
) -> tuple[list[Tokens], dict[str, int]]:
    """Every row as examples of at most `max_length` tokens, and counts of what became of them.

    A longer text is cut into several examples and loses nothing. A longer prompt with completion loses its end
    (`truncated`), and is left out if no token to learn remains (`prompt_too_long`).
    """
    examples: list[Tokens] = []
    counts = {"rows": 0, "used": 0, "truncated": 0, "prompt_too_long": 0}
    encoder = Encoder(tokenizer, frozenset(ends))
    for row in rows:
        tokens = encoder.encode(row)
        counts["rows"] += 1
        if "text" in row:
            # Neighbours share one token, so that every token but the first is predicted once.
            starts = range(0, max(1, len(tokens) - 1), max_length - 1)
            examples += [tokens.cut(s, s + max_length) for s in starts]
        elif any(tokens.said[1:max_length]):
            counts["truncated"] += len(tokens) > max_length
            examples.append(tokens.cut(0, max_length))
        else:
            counts["prompt_too_long"] += 1
            continue
        counts["used"] += 1
    return examples, counts


def unused(split: Split, tokenizer: Any) -> dict[str, str]:
    """For a report: the columns of the data that were not used, and the keys of messages that the template ignores."""
    found = {"columns_not_used": list(split.unused)}
    template = str(tokenizer.chat_template or "")
    keys = {key for row in (*split.train, *split.held_out) for message in row.get("messages", ()) for key in message}
    found["message_keys_not_used"] = sorted(key for key in keys - KNOWN_KEYS if key not in template)
    return {name: ", ".join(names) for name, names in found.items() if names}

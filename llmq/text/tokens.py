"""Token ids of checked rows, with a mark on each token that is to be learned or scored."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.guarded.templates import DAY
from llmq.text.conversation import Conversation, Span
from llmq.text.examples import Tokens
from llmq.text.messages import learned
from llmq.text.pieces import Kept
from llmq.text.tokenizer import beginning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.text.rows import Row
    from llmq.types import Split

KNOWN_KEYS = {"role", "content", "tool_calls", "reasoning_content", "weight"}
"""Keys of a message that are used, or refused where a template does not know them."""


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> Tokens:
    """One row as an example: see `Encoder.encode`."""
    return Encoder(tokenizer, frozenset(ends)).encode(row)


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows, under one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int] = frozenset()
    """The tokens that the model stops at, besides the tokenizer's own end of text."""

    def encode(self, row: Row) -> Tokens:
        """The example of a row. Of a text all tokens are said, of prompt and completion the completion and an end mark.

        Messages go through the chat template; each turn of the assistant is said, up to the end mark of the turn.
        """
        text, learned, others = self._parts(row)
        # In one go: a tokenizer may begin every text that it is given with a mark of its own.
        ids, places = with_places(text, self.tokenizer)  # places: (start, end) in the text
        blank = [not text[a:b].strip() and i not in self._special for i, (a, b) in zip(ids, places, strict=True)]
        *turns, last = _tokens_within(places, learned)
        tail, end = self._until_end_mark(ids, blank, last, self._special)
        # The end mark of the last turn ends the others.
        marks = self._stops | {i for i in ids[tail:end] if i in self._special}
        said = [False] * end
        for is_said, parts in ((True, [*turns, last]), (False, _tokens_within(places, others))):
            for turn in parts:
                stop = min(self._until_end_mark(ids, blank, turn, marks)[1], end)
                said[turn.start : stop] = [is_said] * (stop - turn.start)
        said[last.start : end] = [True] * (end - last.start)  # the example ends with this turn
        return self._framed(ids[:end], said, is_templated=self._is_templated(row))

    def _framed(self, ids: list[int], said: list[bool], is_templated: bool) -> Tokens:
        """The example with the tokenizer's mark before the text and an end mark after, unless those are there."""
        begin = [] if is_templated else self._begin  # a template writes the mark itself
        if ids[:1] != begin:
            ids, said = [*begin, *ids], [*[False] * len(begin), *said]
        end = min(self.ends, default=None) if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        if end is not None and ids[-1:] and ids[-1] not in self._stops:
            ids, said = [*ids, end], [*said, True]
        return Tokens(tuple(ids), tuple(said))

    def _until_end_mark(
        self, ids: Sequence[int], blank: Sequence[bool], turn: range, marks: Collection[int]
    ) -> tuple[int, int]:
        """The end of a turn's words, and of the end mark, which is in the turn or is one of `marks` right after.

        Of several end marks the first that the model stops at is kept; blanks after the mark are not said.
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
        """The text of a row, the spans of that text to be said, and the assistant's turns that are not to be said."""
        if self._is_templated(row):
            talk = Conversation(row, self.tokenizer)
            tagged = talk.tagged()
            return talk.text, tagged or list(talk.turns(True)), list(talk.turns(False)) if tagged else []
        pieces = _pieces(row)
        ends = list(accumulate(len(text) for text, _ in pieces))  # of each piece, in the joined text
        said = [(end - len(text), end) for end, (text, is_said) in zip(ends, pieces, strict=True) if is_said]
        return "".join(text for text, _ in pieces), said, []

    def _is_templated(self, row: Row) -> bool:
        return "messages" in row and bool(self.tokenizer.chat_template)

    @cached_property
    def _begin(self) -> list[int]:
        return beginning(self.tokenizer)

    @cached_property
    def _stops(self) -> frozenset[int]:
        return self.ends | ({self.tokenizer.eos_token_id} - {None})

    @cached_property
    def _special(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return self._stops | {*getattr(self.tokenizer, "all_special_ids", ()), *(i for i in added if added[i].special)}


def with_places(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """The tokens of a text, without marks, and the span of each. Raises `UserError` for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", True):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) is a slow one, which does not "
            "say where its tokens stand in the text; save a fast one beside the model (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def _tokens_within(places: Sequence[Span], spans: Sequence[Span]) -> list[range]:
    """The tokens of each span of a text; a token in two spans belongs to the later one."""
    stops = [stop for _, stop in places]  # ascending, as bisect needs
    return [range(bisect_right(stops, start), bisect_right(stops, end)) for start, end in spans]


def _pieces(row: Row) -> list[tuple[str, bool]]:
    """The texts of a row, each marked as said or not; without a template messages are lines."""
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
    last = max(i for i, m in enumerate(messages) if learned(m))  # no turn after it is learned
    said = [(m["content"], learned(m)) for m in messages[: last + 1]]
    return [*((text + "\n", is_said) for text, is_said in said[:-1]), said[-1]]


def prompt_and_reference(
    row: Row, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()
) -> tuple[tuple[int, ...], str]:
    """The tokens before the last answer in a row, as in training, and that answer as text."""
    tokens = encode(row, tokenizer, ends)
    # The place after the last token not said.
    begin = max((i + 1 for i, is_said in enumerate(tokens.said) if not is_said), default=0)
    return tokens.ids[:begin], str(tokenizer.decode(tokens.ids[begin:], skip_special_tokens=True))


def shown_prompt(row: Row) -> str:
    """The last message of the user, or the prompt, for a reader."""
    if "messages" in row:
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return str(asked[-1] if asked else row["messages"][0]["content"])
    return str(row.get("prompt", ""))


def encode_all(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, ends: Iterable[int] = ()
) -> tuple[Sequence[Tokens], dict[str, int]]:
    """Every row as examples of at most `max_length` tokens, and the counts of rows used, truncated and left out.

    A longer text is cut into several examples and loses nothing. A longer prompt with completion loses the end
    (`truncated`), and is left out if no token to learn remains (`prompt_too_long`).
    """
    counts = {"rows": 0, "used": 0, "truncated": 0, "prompt_too_long": 0}
    return kept(_examples(rows, Encoder(tokenizer, frozenset(ends)), max_length, counts)), counts


def kept(examples: Iterable[Tokens]) -> Sequence[Tokens]:
    """The examples, as a sequence that needs little memory."""
    return Kept(((e.ids, e.said) for e in examples), lambda parts: Tokens(*parts))


def _examples(rows: Iterable[Row], encoder: Encoder, max_length: int, counts: dict[str, int]) -> Iterator[Tokens]:
    for row in rows:
        tokens = encoder.encode(row)
        counts["rows"] += 1
        if "text" in row:
            # Neighbours share one token, so that every token but the first is predicted once.
            for start in range(0, max(1, len(tokens) - 1), max_length - 1):
                yield tokens.cut(start, start + max_length)
        elif any(tokens.said[1:max_length]):  # nothing predicts the first token
            counts["truncated"] += len(tokens) > max_length
            yield tokens.cut(0, max_length)
        else:
            counts["prompt_too_long"] += 1
            continue
        counts["used"] += 1


def unused(split: Split, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Notes on unused columns of the data, message keys that the template ignores, and the date that it writes."""
    template = str(tokenizer.chat_template or "")
    keys = {key for row in chain(split.train, split.held_out) for message in row.get("messages", ()) for key in message}
    ignored = sorted(key for key in keys - KNOWN_KEYS if key not in template)
    dates = [f"{DAY:%Y-%m-%d}"] if "strftime_now" in template and split.shape != "text" else []
    notes = {"columns_not_used": split.unused, "message_keys_not_used": ignored, "date_in_chat_template": dates}
    return {name: ", ".join(names) for name, names in notes.items() if names}

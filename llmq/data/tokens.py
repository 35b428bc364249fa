"""Checked rows -> token ids, with the mark of what is to be learned or scored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.data.rows import Row
from llmq.errors import UserError

IGNORED = -100
"""The label that PyTorch's cross-entropy skips."""


@dataclass(frozen=True)
class Tokens:
    """One example: token ids, and for each whether the model should have said it."""

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


def encode(row: Row, tokenizer: Any) -> Tokens:
    """Token ids of a row: all of a text is said, of a prompt and completion the completion and the end of text.

    Messages go through the tokenizer's chat template; what the assistant says is said, up to and with its end mark.
    """
    pieces = _pieces(row, tokenizer)
    if not getattr(tokenizer, "is_fast", True):
        raise UserError("this tokenizer does not say where its tokens stand in the text; llmq needs a fast one")
    # In one go: a tokenizer may begin every text that it is given with a mark of its own.
    encoded = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
    begin = beginning(tokenizer) if "messages" not in row or not tokenizer.chat_template else []
    ids = [*begin, *encoded["input_ids"]]
    said = [False] * len(begin) + _marks(pieces, encoded["offset_mapping"])
    last_said = [token for token, is_said in zip(ids, said, strict=True) if is_said][-2:]
    if said[-1] and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in last_said:
        ids.append(tokenizer.eos_token_id)
        said.append(True)
    return Tokens(tuple(ids), tuple(said))


def _marks(pieces: Sequence[tuple[str, bool]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token whether it is said; one that stands in two pieces belongs to the later."""
    marks: list[bool] = []
    piece, end = 0, len(pieces[0][0])
    for _, stop in spans:
        while stop > end:
            piece += 1
            end += len(pieces[piece][0])
        marks.append(pieces[piece][1])
    return marks


def beginning(tokenizer: Any) -> Sequence[int]:
    """The mark that a tokenizer puts before every text (Llama), or nothing (SmolLM2)."""
    marked = tokenizer("")["input_ids"]
    return marked[:1] if marked and marked[0] == tokenizer.bos_token_id else []


def _pieces(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    if "text" in row:
        return [(row["text"], True)]
    if "prompt" in row:
        return [(row["prompt"], False), (row["completion"], True)]
    messages = row["messages"]
    if not tokenizer.chat_template:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        said = [(m["content"], m["role"] == "assistant") for m in messages[: last + 1]]
        return [*((text + "\n", is_said) for text, is_said in said[:-1]), said[-1]]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            for end, is_said in (
                (_chat(tokenizer, messages[:i], prompt=True), False),
                (_chat(tokenizer, messages[: i + 1], prompt=False), True),
            ):
                if not end.startswith(done):
                    raise UserError(
                        "the chat template of this tokenizer rewrites earlier turns when a later one "
                        "comes, so what the assistant said cannot be told apart; use one turn a row"
                    )
                pieces.append((end[len(done) :], is_said))
                done = end
    return pieces


def _chat(tokenizer: Any, messages: Sequence[Row], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        said = str(messages[0]["content"])[:40]
        raise UserError(f"the chat template of this tokenizer refuses the row that begins {said!r}: {error}") from None


def prompt_and_reference(row: Row, tokenizer: Any) -> tuple[tuple[int, ...], str]:
    """The tokens before the last thing that the model should say, as in training, and that thing."""
    tokens = encode(row, tokenizer)
    begin = max((i + 1 for i, is_said in enumerate(tokens.said) if not is_said), default=0)
    return tokens.ids[:begin], str(tokenizer.decode(tokens.ids[begin:], skip_special_tokens=True))


def shown_prompt(row: Row) -> str:
    """The last thing that a person wrote, for a reader."""
    if "messages" in row:
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return str(asked[-1] if asked else row["messages"][0]["content"])
    return str(row.get("prompt", ""))


def encode_all(rows: Iterable[Row], tokenizer: Any, max_length: int) -> tuple[list[Tokens], dict[str, int]]:
    """Every row as examples of at most `max_length` tokens, and counts of what became of them.

    A longer text is cut into several examples and loses nothing. A longer prompt with completion loses its end
    (`truncated`), and is left out if no token to learn remains (`prompt_too_long`).
    """
    examples: list[Tokens] = []
    counts = {"rows": 0, "used": 0, "truncated": 0, "prompt_too_long": 0}
    for row in rows:
        tokens = encode(row, tokenizer)
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

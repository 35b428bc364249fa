"""Token windows of a text, and completions of rows after their prompts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

from llmq.errors import UserError
from llmq.text.examples import Tokens
from llmq.text.tokenizer import beginning
from llmq.text.tokens import encode_all, with_places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.artifact import Artifact
    from llmq.text.rows import Row
    from llmq.types import Data, Split


@dataclass(frozen=True)
class Window:
    """Tokens to score, and the words and bytes of text that the scored tokens are."""

    tokens: Tokens
    words: int
    bytes: int

    @property
    def scored(self) -> int:
        """The number of tokens to score; the first of a window has nothing before it, and never counts."""
        return sum(self.tokens.said[1:])


def joined(rows: Iterable[Row]) -> str:
    """Text rows as one text with empty lines between; a row that continues the row before follows without one."""
    pieces: list[str] = []
    for row in rows:
        pieces += ["\n\n", row["text"]] if pieces and not row.get("continues") else [row["text"]]
    return "".join(pieces)


def windows_of(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
    stride: int | None = None,
    bos: bool = False,
) -> list[Window]:
    """Windows of `length` tokens every `stride` tokens (`length` if unset) over a text; each token is scored once.

    With a stride shorter than the window, a window scores its last `stride` tokens and sees the others. The first token
    of a window that nothing precedes is not scored, unless `bos` puts the beginning-of-text mark there. Where a window
    begins with that mark by itself, no second one is put before it, and the mark is not scored.
    """
    ids, spans = with_places(text, tokenizer)
    if bos and tokenizer.bos_token_id is None:
        raise UserError("bos: true, and this tokenizer has no beginning-of-text mark")
    mark = [tokenizer.bos_token_id] if bos else []
    if mark and ids[:1] == mark:
        ids, spans = ids[1:], spans[1:]
    step, body = stride or length, length - len(mark)  # body: tokens of the text in a window
    windows: list[Window] = []
    word_starts = [word.start() for word in re.finditer(r"\S+", text)]  # ascending, as bisect needs
    done = covered = 0
    for start in range(0, max(1, len(ids)), min(step, body)):  # no further than the window reaches
        end = min(start + body, len(ids))
        begin = [] if ids[start : start + 1] == mark else mark
        said = [False] * len(begin) + [i >= done for i in range(start, end)]  # those before are context
        if any(said[1:]):
            first = start + said.index(True, 1) - len(begin)  # the first scored token, as a place in `ids`
            # A character or a word that two windows share counts in the one where it begins.
            told = slice(max(spans[first][0], covered), spans[end - 1][1])
            words = bisect_left(word_starts, told.stop) - bisect_left(word_starts, told.start)
            windows.append(Window(Tokens((*begin, *ids[start:end]), tuple(said)), words, len(text[told].encode())))
            covered = told.stop
        done = end
        if end == len(ids) or len(windows) == limit:
            break
    return windows


def completions(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int, ends: Iterable[int] = ()
) -> tuple[list[Window], dict[str, int]]:
    """A window for each row with a prompt, whose completion is scored, and the counts of `encode_all`."""
    examples, counts = encode_all(rows, tokenizer, length, ends)
    windows = []
    for tokens in examples:
        text = _said(tokens, tokenizer)
        windows.append(Window(tokens, len(text.split()), len(text.encode())))
    return windows, counts


def _said(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokens that are said, each stretch of them as it stands behind the tokens before.

    A tokenizer of sentencepiece drops the space that a text of its own begins with.
    """
    text, end = "", 0
    for is_said, stretch in groupby(tokens.said):
        begin, end = end, end + len(list(stretch))
        if is_said:
            before, whole = (tokenizer.decode(tokens.ids[:i], skip_special_tokens=True) for i in (begin, end))
            alone = tokenizer.decode(tokens.ids[begin:end], skip_special_tokens=True)
            text += whole.removeprefix(before) if before and whole.startswith(before) else alone
    return text


def held_out_windows(
    split: Split, tokenizer: PreTrainedTokenizerBase, length: int, limit: int, ends: Iterable[int] = ()
) -> tuple[list[Window], str]:
    """At most `limit` windows of the held-out part of a data set of any shape, and a description in words.

    A window begins with the mark that the tokenizer puts before every text: a model that learned with the mark (Gemma)
    answers nonsense without. `ends` are the tokens that the model stops at.
    """
    if split.shape == "text":
        bos = bool(beginning(tokenizer))
        windows = windows_of(joined(split.held_out), tokenizer, length, limit, bos=bos)
        return windows, f"{len(windows)} windows of {length} tokens, no overlap{', BOS first' if bos else ''}"
    windows = completions(split.held_out[:limit], tokenizer, length, ends)[0]
    return windows, f"{len(windows)} completions after their prompts, at most {length} tokens"


BEGINNING = 4096
"""The characters of a text that are encoded to see that the text can be used."""


def check_rows(base: Artifact, data: Data, part: str, length: int) -> None:
    """Raise `UserError` unless a row of this part of the data leaves a token to learn or to score in `length`."""
    from llmq.text.tokenizer import load_tokenizer

    split = data.read()
    sides = {"train": (split.train,), "held_out": (split.held_out,), "all": (split.train, split.held_out)}[part]
    of = f"the {part.replace('_', '-')} part of {data.word}"
    if not any(map(len, sides)):
        raise UserError(f"{of} is empty; change its held_out, or name other data")
    tokenizer = load_tokenizer(base.weights)
    for row in chain(*sides):
        begun = {"text": row["text"][:BEGINNING]} if "text" in row else row
        if any(any(tokens.said[1:]) for tokens in encode_all([begun], tokenizer, length)[0]):
            return
    raise UserError(f"{of} has no row that leaves a token to learn or to score within {length} tokens")

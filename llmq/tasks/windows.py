"""Cutting a text into token windows, and the loss of a model on them."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from llmq.artifact import Artifact
from llmq.data.rows import Row
from llmq.data.tokens import IGNORED, Tokens, encode_all, with_places
from llmq.errors import LlmqError, UserError
from llmq.types import Data, Split


@dataclass(frozen=True)
class Window:
    """Tokens to score, and how much text those tokens are."""

    tokens: Tokens
    words: int
    bytes: int

    @property
    def scored(self) -> int:
        """How many tokens have something before them to be predicted from, and are to be scored."""
        return sum(self.tokens.said[1:])


def joined(rows: Iterable[Row]) -> str:
    """Text rows as one text, an empty line between them; one that continues the row before follows it directly."""
    pieces: list[str] = []
    for row in rows:
        pieces += ["\n\n", row["text"]] if pieces and not row.get("continues") else [row["text"]]
    return "".join(pieces)


def windows_of(
    text: str, tokenizer: Any, length: int, limit: int | None = None, stride: int | None = None, bos: bool = False
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
    step, body = stride or length, length - len(mark)
    windows: list[Window] = []
    word_starts = [word.start() for word in re.finditer(r"\S+", text)]
    done = covered = 0
    for start in range(0, max(1, len(ids)), min(step, body)):
        end = min(start + body, len(ids))
        begin = [] if ids[start : start + 1] == mark else mark
        said = [False] * len(begin) + [i >= done for i in range(start, end)]
        if any(said[1:]):
            first = start + said.index(True, 1) - len(begin)
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
    rows: Sequence[Row], tokenizer: Any, length: int, ends: Iterable[int] = ()
) -> tuple[list[Window], dict[str, int]]:
    """A window for each row with a prompt, of which what the model should say is scored; what became of the rows."""
    examples, counts = encode_all(rows, tokenizer, length, ends)
    windows: list[Window] = []
    for tokens in examples:
        said = [token for token, is_said in zip(tokens.ids, tokens.said, strict=True) if is_said]
        text = tokenizer.decode(said, skip_special_tokens=True)
        windows.append(Window(tokens, len(text.split()), len(text.encode())))
    return windows, counts


def held_out_windows(split: Split, tokenizer: Any, length: int, limit: int) -> tuple[list[Window], str]:
    """At most `limit` windows of the held-out part of a data set of any shape, and what they are in words."""
    if split.shape == "text":
        windows = windows_of(joined(split.held_out), tokenizer, length, limit)
        return windows, f"{len(windows)} windows of {length} tokens, no overlap"
    windows = completions(split.held_out[:limit], tokenizer, length)[0]
    return windows, f"{len(windows)} completions after their prompts, at most {length} tokens"


BEGINNING = 4096
"""Characters of a text that are looked at to see that it can be used."""


def check_rows(base: Artifact, data: Data, part: str, length: int) -> None:
    """Raise `UserError` unless a row of this part of the data leaves a token to learn or to score in `length`."""
    from llmq.models.hugging_face import load_tokenizer

    split = data.read()
    rows = {"train": split.train, "held_out": split.held_out, "all": [*split.train, *split.held_out]}[part]
    of = f"the {part.replace('_', '-')} part of {data.word}"
    if not rows:
        raise UserError(f"{of} is empty; change its held_out, or name other data")
    tokenizer = load_tokenizer(base.weights)
    for row in rows:
        begun = {"text": row["text"][:BEGINNING]} if "text" in row else row
        if any(any(tokens.said[1:]) for tokens in encode_all([begun], tokenizer, length)[0]):
            return
    raise UserError(f"{of} has no row that leaves a token to learn or to score within {length} tokens")


def batches(windows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices of windows to be run together: the longest first, so that a batch wastes little on padding."""
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(batch: Sequence[Tokens], device: str) -> tuple[Any, Any]:
    """(ids, labels), each (windows, tokens), padded on the right, where a causal model cannot look."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[*t.ids, *[0] * (width - len(t))] for t in batch])
    labels = torch.tensor([[*t.labels(), *[IGNORED] * (width - len(t))] for t in batch])
    return ids.to(device), labels.to(device)


def losses(module: Any, windows: Sequence[Tokens], device: str, batch_size: int) -> list[float]:
    """The summed loss of each window's scored tokens, in nats, in their order; float32 softmax over the logits."""
    import torch

    from llmq.terminal import track

    sums = [0.0] * len(windows)
    with torch.inference_mode():
        for rows in track(list(batches(windows, batch_size)), "perplexity"):
            ids, labels = padded([windows[i] for i in rows], device)
            logits = module(input_ids=ids, use_cache=False).logits
            for i, row_logits, row_labels in zip(rows, logits, labels, strict=True):
                sums[i] = float(
                    torch.nn.functional.cross_entropy(
                        row_logits.float(), row_labels, ignore_index=IGNORED, reduction="sum"
                    )
                )
    if not all(map(isfinite, sums)):
        raise LlmqError("the loss of this model is not a finite number, so its weights or its dtype are broken")
    return sums

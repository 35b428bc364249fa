"""The log-probabilities that a model gives to continuations of contexts: the scores of multiple choice."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor
from transformers import PreTrainedModel

from llmq import together
from llmq.terminal import Bar
from llmq.text import prefix_attention, prefix_tree
from llmq.text.attention import crosses

TOKENS = 2048
"""Tokens in a forward pass: enough to keep the cores busy. A longer sequence has one to itself."""
LEAST = 128
"""Tokens in a forward pass at least: packed layers compute few rows by another kernel than many."""
LOGITS = 32
"""Rows of logits that are turned into float32 at a time: few enough for the caches, as a score is of one row."""


@dataclass(frozen=True)
class Request:
    """A sequence whose last `scored` tokens are scored, each from all tokens before."""

    tokens: tuple[int, ...]
    scored: int


Score = tuple[float, bool]
"""The sum of the log-probabilities in nats, and True if every token was the likeliest."""
Forward = tuple[Tensor, dict[int, Sequence[int]]]
"""Logits (rows, vocabulary), and for each sequence the rows of the scored positions, up to the end."""


def score(
    module: PreTrainedModel, requests: Sequence[Request], device: str, batch_size: int | None = None
) -> list[Score]:
    """The score of each request, at most `batch_size` sequences in a forward pass.

    A shared beginning of sequences is computed once where the model allows it. Log-probabilities are float32, from
    logits in the dtype of the model. All continuations of one token after one context need one sequence.
    """
    return together.answers(_scores, [module], device, requests, batch_size)


def _scores(
    module: PreTrainedModel,
    device: str,
    share: together.Share,
    requests: Sequence[Request],
    batch_size: int | None,
) -> dict[int, Score]:
    """The scores of the requests in a share of the forward passes."""
    asked: dict[tuple[int, ...], list[int]] = {}  # what the model is shown: the last token is only predicted
    for i, request in enumerate(requests):
        asked.setdefault(request.tokens[:-1], []).append(i)
    sequences = list(asked)
    scored = [max(requests[i].scored for i in asked[s]) for s in sequences]  # the most of any request
    scores: dict[int, Score] = {}
    bar = Bar("scoring", len(sequences) // share.processes)
    with torch.inference_mode():
        for logits, rows_of in _forwards(module, sequences, scored, device, batch_size, share):
            members = [i for s in rows_of for i in asked[sequences[s]]]
            targets = [requests[i].tokens[len(requests[i].tokens) - requests[i].scored :] for i in members]
            rows = [rows_of[s][-requests[i].scored :] for s in rows_of for i in asked[sequences[s]]]
            for i, score_of_one in zip(members, _read(logits, targets, rows), strict=True):
                scores[i] = score_of_one
            del logits  # else they wait beside those of the next batch
            for _ in rows_of:
                bar.advance()
    bar.close()
    return scores


def _forwards(
    module: PreTrainedModel,
    sequences: Sequence[tuple[int, ...]],
    scored: Sequence[int],
    device: str,
    batch_size: int | None,
    share: together.Share,
) -> Iterator[Forward]:
    alone = of_the_batch(module) or crosses(module, *map(len, sequences))
    if alone or prefix_attention.why_not(module, device):
        batches = share.of(_batches(sequences, 1 if alone else batch_size))
        yield from _padded(module, sequences, scored, device, batches)
        return
    for row in share.of(prefix_tree.rows(sequences, TOKENS, batch_size)):
        # The places whose logits predict the scored tokens.
        ends = {i: p[-scored[i] :] for i, p in zip(row.members, row.places, strict=True)}
        kept = sorted({place for places in ends.values() for place in places})
        where = {place: k for k, place in enumerate(kept)}  # place in the row -> row of the logits
        rows_of: dict[int, Sequence[int]] = {i: [where[p] for p in places] for i, places in ends.items()}
        yield prefix_attention.forward(module, row, kept, device, LEAST), rows_of


def _batches(sequences: Sequence[tuple[int, ...]], batch_size: int | None) -> Iterator[list[int]]:
    """The numbers of sequences of like length, longest first, in batches."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), sequences[i]))
    while order:
        count = min(batch_size or len(order), max(1, TOKENS // len(sequences[order[0]])))
        batch, order = order[:count], order[count:]
        yield batch


def _padded(
    module: PreTrainedModel,
    sequences: Sequence[tuple[int, ...]],
    scored: Sequence[int],
    device: str,
    batches: Iterable[Sequence[int]],
) -> Iterator[Forward]:
    """Logits of batches of sequences, longest first, padded on the right, where a causal model cannot look."""
    for batch in batches:
        width = len(sequences[batch[0]])
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # (sequences, tokens)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        logits = module(input_ids=ids.to(device), use_cache=False).logits  # (sequences, tokens, vocabulary)
        ends = [logits[row, len(sequences[i]) - scored[i] : len(sequences[i])] for row, i in enumerate(batch)]
        starts = [0, *accumulate(map(len, ends))]
        yield torch.cat(ends), {i: range(*span) for i, span in zip(batch, pairwise(starts), strict=True)}


def _read(logits: Tensor, targets: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> Iterator[Score]:
    """The score of each request, from the targets and the rows of the logits (rows, vocabulary) that predict them."""
    # Written in their place: a result beside the float copies of a part would keep the next from taking their room.
    total = torch.empty(len(logits), device=logits.device)  # (rows,)
    best = torch.empty(len(logits), dtype=torch.long, device=logits.device)  # (rows,)
    for part, total_of, best_of in zip(*(torch.split(t, LOGITS) for t in (logits, total, best)), strict=True):
        torch.logsumexp(part.float(), -1, out=total_of)
        torch.argmax(part, -1, out=best_of)
    likeliest = best.tolist()
    all_rows = torch.tensor([r for places in rows for r in places], device=logits.device)
    all_targets = torch.tensor([t for wanted in targets for t in wanted], device=logits.device)
    values = iter((logits[all_rows, all_targets].float() - total[all_rows]).tolist())  # (scored,)
    for wanted, places in zip(targets, rows, strict=True):
        likely = all(likeliest[r] == t for r, t in zip(places, wanted, strict=True))
        yield sum(next(values) for _ in wanted), likely


def of_the_batch(module: PreTrainedModel) -> bool:
    """True for a model that treats a token by the rest of the batch: LLM.int8 finds outliers in all tokens at once.

    Such a model is asked one sequence at a time, or scores would depend on the batch size.
    """
    return any(isinstance(layer, Linear8bitLt) for layer in module.modules())

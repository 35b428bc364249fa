"""How likely a model finds continuations of contexts: the log-probabilities behind multiple choice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.tasks import prefix_attention, prefix_tree

TOKENS = 2048
"""Tokens in a forward pass: enough to keep the cores busy. A longer sequence has one to itself."""
LEAST = 128
"""Tokens in a forward pass at least: packed layers compute few rows by another kernel than many."""
LOGITS = 128
"""Rows of logits that are turned into float32 at a time."""


@dataclass(frozen=True)
class Request:
    """What is asked: the last `scored` of `tokens`, each from all that stands before it."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def seen(self) -> tuple[int, ...]:
        """What the model is shown: the last token is only predicted."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that are scored."""
        return self.tokens[len(self.tokens) - self.scored :]


Score = tuple[float, bool]
"""Sum of the log-probabilities in nats, and whether each token was the likeliest."""
Forward = tuple[Any, dict[int, Sequence[int]]]
"""Logits (rows, vocabulary), and for each sequence the rows of its scored positions, to its end."""


def score(module: Any, requests: Sequence[Request], device: str, batch_size: int | None = None) -> list[Score]:
    """The score of each request, at most `batch_size` sequences in a forward pass.

    What sequences begin with alike is computed once where the model allows it; its float32 log-probabilities are of the
    model's own logits. Continuations of one token after one context need one sequence.
    """
    import torch

    from llmq.terminal import Bar

    asked: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        asked.setdefault(request.seen, []).append(i)
    sequences = list(asked)
    scored = [max(requests[i].scored for i in asked[s]) for s in sequences]
    found: list[Score] = [(0.0, False)] * len(requests)
    bar = Bar("scoring", len(sequences))
    with torch.inference_mode():
        for logits, rows_of in _forwards(module, sequences, scored, device, batch_size):
            members = [(i, rows_of[s][-requests[i].scored :]) for s in rows_of for i in asked[sequences[s]]]
            for i, its in _read(logits, [(i, requests[i].targets, rows) for i, rows in members]):
                found[i] = its
            for _ in rows_of:
                bar.advance()
    bar.close()
    return found


def _forwards(
    module: Any, sequences: Sequence[tuple[int, ...]], scored: Sequence[int], device: str, batch_size: int | None
) -> Iterator[Forward]:
    if of_the_batch(module):
        yield from _padded(module, sequences, scored, device, 1)
    elif prefix_attention.why_not(module, device):
        yield from _padded(module, sequences, scored, device, batch_size)
    else:
        for row in prefix_tree.rows(sequences, TOKENS, batch_size):
            ends = {i: p[-scored[i] :] for i, p in zip(row.members, row.places, strict=True)}
            kept = sorted({place for places in ends.values() for place in places})
            where = {place: k for k, place in enumerate(kept)}
            logits = prefix_attention.forward(module, row, kept, device, LEAST)
            yield logits, {i: [where[p] for p in places] for i, places in ends.items()}


def _padded(
    module: Any, sequences: Sequence[tuple[int, ...]], scored: Sequence[int], device: str, batch_size: int | None
) -> Iterator[Forward]:
    """Sequences of like length together, padded on the right, where a causal model cannot look."""
    import torch

    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), sequences[i]))
    while order:
        width = len(sequences[order[0]])
        count = min(batch_size or len(order), max(1, TOKENS // width))
        batch, order = order[:count], order[count:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        logits = module(input_ids=ids.to(device), use_cache=False).logits
        ends = [logits[row, len(sequences[i]) - scored[i] : len(sequences[i])] for row, i in enumerate(batch)]
        starts = [0]
        for part in ends:
            starts.append(starts[-1] + len(part))
        yield torch.cat(ends), {i: range(starts[k], starts[k + 1]) for k, i in enumerate(batch)}


def _read(logits: Any, asked: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Score]]:
    """The score of each (request, targets, rows of the logits)."""
    import torch

    totals, best = [], []
    for part in logits.split(LOGITS):
        totals.append(part.float().logsumexp(-1))
        best.append(part.argmax(-1))
    total, likeliest = torch.cat(totals), torch.cat(best).tolist()
    rows = torch.tensor([r for _, _, rows in asked for r in rows], device=logits.device)
    targets = torch.tensor([t for _, targets, _ in asked for t in targets], device=logits.device)
    values = iter((logits[rows, targets].float() - total[rows]).tolist())
    for i, wanted, places in asked:
        its = [next(values) for _ in wanted]
        yield i, (sum(its), all(likeliest[r] == t for r, t in zip(places, wanted, strict=True)))


def of_the_batch(module: Any) -> bool:
    """Whether a layer treats a token by what else is in the batch: LLM.int8 finds its outliers in all tokens at once.

    Such a model is asked one sequence at a time, or its scores would depend on the batch size.
    """
    from bitsandbytes.nn import Linear8bitLt

    return any(isinstance(layer, Linear8bitLt) for layer in module.modules())

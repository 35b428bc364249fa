"""The loss of a language model on windows of tokens, and the divergence of two models on them."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from math import isfinite
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq import resident, together
from llmq.errors import LlmqError
from llmq.statistics.figures import ratio
from llmq.terminal import track
from llmq.text.attention import crosses
from llmq.text.examples import IGNORED, Tokens
from llmq.text.linear_view import blocks_of
from llmq.text.passes import Passes
from llmq.types import Measurement

ROWS = 32
"""Tokens whose logits are in float32 at a time: few enough for the caches of a processor, half the time of 128."""


def batches(windows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices of windows to be run together: sorted by length, longest first, so that a batch has little padding."""
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(batch: Sequence[Tokens], device: str) -> tuple[Tensor, Tensor]:
    """(ids, labels), each (windows, tokens), padded on the right, which a causal model cannot see."""
    width = max(map(len, batch))
    # Any token can pad, since padding comes last and is not scored.
    ids = torch.tensor([[*t.ids, *[0] * (width - len(t))] for t in batch])
    labels = torch.tensor([[*t.labels(), *[IGNORED] * (width - len(t))] for t in batch])
    return ids.to(device), labels.to(device)


def losses(module: PreTrainedModel, windows: Sequence[Tokens], device: str, batch_size: int) -> list[float]:
    """The summed loss of the scored tokens of each window, in nats; float32 softmax over the logits."""
    size = 1 if windows and crosses(module, *map(len, windows)) else batch_size
    sums = together.answers(_losses, [module], device, windows, size)
    if not all(map(isfinite, sums)):
        raise LlmqError("the loss of this model is not a finite number, so its weights or its dtype are broken")
    return sums


def _losses(
    module: PreTrainedModel, device: str, share: together.Share, windows: Sequence[Tokens], batch_size: int
) -> dict[int, float]:
    """The losses of a share of the batches of windows."""
    sums: dict[int, float] = {}
    with torch.inference_mode():
        for rows in track(list(share.of(batches(windows, batch_size))), "perplexity"):
            ids, labels = padded([windows[i] for i in rows], device)
            logits = module(input_ids=ids, use_cache=False).logits  # (windows, tokens, vocabulary)
            for i, of_window, wanted in zip(rows, logits, labels, strict=True):
                sums[i] = sum(map(_loss, of_window.split(ROWS), wanted.split(ROWS)))
            del logits, of_window  # the largest tensors by far; else they wait beside those of the next batch
    return sums


def _loss(logits: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum"))


def divergence_of(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """The sum of KL(reference || other) over the rows of logits (tokens, vocabulary), and the like top tokens."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float(torch.sum(p.exp() * (p - q))), float((p.argmax(-1) == q.argmax(-1)).sum())


def divergence(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    windows: Sequence[Tokens],
    device: str,
    task: str,
    metric: str,
    protocol: str,
    by_block: bool = False,
) -> tuple[Measurement, Measurement]:
    """Mean KL(reference || other) in nats a token, named `metric`, and the share of tokens with the same top token.

    Both come from float64 softmax over the logits; the sums of each window are kept. `by_block` takes all windows
    through a block before the next, so that a model in files that are larger than memory is read once.
    """
    sums = together.answers(_divergences, [reference, other], device, windows, by_block)
    divergences, agreements, tokens = zip(*sums, strict=True)
    return (
        ratio(task, metric, divergences, tokens, "nats/token", "lower", protocol),
        ratio(task, "top1_agreement", agreements, tokens, "share of tokens", "higher", protocol),
    )


def _divergences(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    device: str,
    share: together.Share,
    windows: Sequence[Tokens],
    by_block: bool,
) -> dict[int, tuple[float, float, float]]:
    """The divergence, the agreements and the tokens of a share of the windows."""
    sums: dict[int, tuple[float, float, float]] = {}
    own = list(share.of(range(len(windows))))
    batches = [padded([windows[i]], device) for i in own]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        way = _all_by_block if by_block else _one_by_one
        ours, theirs = (stack.enter_context(closing(way(m, [ids for ids, _ in batches]))) for m in (reference, other))
        for i, (_, labels) in zip(track(own, "divergence"), batches, strict=True):
            scored = labels[0] != IGNORED  # (tokens,): of a completion its prompt is not
            p, q = (next(logits)[0].to(device)[scored] for logits in (ours, theirs))  # (tokens, vocabulary)
            told = [divergence_of(p[k : k + ROWS], q[k : k + ROWS]) for k in range(0, len(p), ROWS)]
            sums[i] = (sum(t[0] for t in told), sum(t[1] for t in told), float(scored.sum()))
    return sums


def _one_by_one(module: PreTrainedModel, batches: Sequence[Tensor]) -> Generator[Tensor]:
    """The logits of each batch of tokens."""
    for ids in batches:
        # A model that another runtime runs may lie elsewhere.
        yield module(input_ids=ids.to(module.device), use_cache=False).logits


def _all_by_block(module: PreTrainedModel, batches: Sequence[Tensor]) -> Generator[Tensor]:
    """The same logits, all batches gone through a block before the next; of files, one block is in memory at a time."""
    passes = Passes(lambda ids: next(_one_by_one(module, [ids])), batches)
    blocks = [module.get_submodule(name) for name in blocks_of(module)]
    for block in blocks:
        passes.wait_before(block)
    with passes.started():
        for block in blocks[:-1]:
            passes.resume()
            resident.forget(block.state_dict().values())
        yield from cast(Iterator[Tensor], passes.ends())

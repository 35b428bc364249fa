"""Attention over a row of sequences that share their beginnings (`prefix_tree`).

Every query sees the keys of its own sequence, gathered in their order. A processor's bfloat16 products give each row of
a matrix the same bits whatever stands beside it, and keys that are masked at the end add exact zeros; so an output
depends on its own sequence alone, and neither sharing nor batch size changes a score.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from llmq.text.attention import disagreement, exchanged, why_fixed
from llmq.text.prefix_tree import Piece, Row, common

Attend = Callable[[Module, Tensor, Tensor, Tensor, float], Tensor]
"""(module of the layer, query, key, value, scaling) -> (tokens, heads, d)"""
Store = Callable[[int, Tensor, Tensor], None]
"""(number of the layer, keys, values), each (groups, tokens, d)"""

STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # lengths of pieces; those up to one of these are batched
SCORES = 2**24
"""The most attention scores held at a time."""
TOLERANCE = 0.05
"""Logits may differ by this from the model's own on a probe, relative to the largest."""
SAME = 1e-6
"""The rounding of float32 may move logits by this, relative to the largest."""


@dataclass(frozen=True)
class Batch:
    """Pieces of like size, padded at their ends: indices into the row, and the keys that each query must not see."""

    queries: Tensor
    """(pieces, queries); padding asks for the row's first token."""
    keys: Tensor
    """(pieces, keys)"""
    mask: Tensor
    """(pieces, 1, queries, keys), additive"""
    targets: Tensor
    """(pieces * queries); padding is written to a place after the row's end."""


def batches(pieces: Sequence[Piece], tokens: int, heads: int, dtype: torch.dtype, device: str) -> list[Batch]:
    """The pieces of a row of `tokens` tokens, in batches of pieces of like size."""
    alike: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        size = next(s for s in STEPS if s >= piece.length)
        # Padding at most doubles the keys.
        alike.setdefault((size, (len(piece.keys) - 1).bit_length()), []).append(piece)
    plan = []
    for group in alike.values():
        widest = max(len(p.keys) for p in group) * max(p.length for p in group) * heads
        count = max(1, SCORES // widest)
        plan += [_batch(group[i : i + count], tokens, dtype, device) for i in range(0, len(group), count)]
    return plan


def _batch(pieces: Sequence[Piece], tokens: int, dtype: torch.dtype, device: str) -> Batch:
    length, width = max(p.length for p in pieces), max(len(p.keys) for p in pieces)

    def runs(starts: Sequence[int], filling: Sequence[int]) -> Tensor:
        padded = zip(pieces, starts, filling, strict=True)
        return torch.tensor([[*range(s, s + p.length), *[f] * (length - p.length)] for p, s, f in padded])

    starts, firsts = [p.start for p in pieces], [p.first for p in pieces]
    keys = torch.tensor([[*p.keys, *[0] * (width - len(p.keys))] for p in pieces])  # (pieces, keys)
    # A padding query may see any keys, but must see one, or its softmax would be NaN.
    hidden = torch.arange(width)[None, None] > runs(firsts, firsts)[..., None]  # (pieces, queries, keys)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    targets = runs(starts, [tokens] * len(pieces)).flatten()  # (pieces * queries,)
    return Batch(
        runs(starts, [0] * len(pieces)).to(device), keys.to(device), mask[:, None].to(device), targets.to(device)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, plan: Sequence[Batch]) -> Tensor:
    """`softmax(q k' scaling) v` for every query of the row over the keys of its own sequence.

    query (heads, tokens, d); key, value (groups, tokens, d), heads a multiple of groups. Returns (tokens, heads, d).
    """
    heads, tokens, d = query.shape
    groups = key.shape[0]
    per_group = heads // groups
    scaled = (query * scaling).view(groups, per_group, tokens, d)  # (groups, heads of a group, tokens, d)
    out = query.new_zeros(tokens + 1, heads, value.shape[-1])  # the last row takes the padding
    for batch in plan:
        count, length = batch.queries.shape
        # (groups, pieces, heads of a group * queries, d)
        q = scaled[:, :, batch.queries].transpose(1, 2).reshape(groups, count, per_group * length, d)
        scores = q @ key[:, batch.keys].transpose(-1, -2)  # (groups, pieces, heads of a group * queries, keys)
        scores = scores.view(groups, count, per_group, length, -1) + batch.mask
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = weights.view(groups, count, per_group * length, -1) @ value[:, batch.keys]
        # (pieces, queries, groups, heads of a group, d)
        mixed = mixed.view(groups, count, per_group, length, -1).permute(1, 3, 0, 2, 4)
        out[batch.targets] = mixed.reshape(count * length, heads, -1)
    return out[:tokens]


def forward(
    module: PreTrainedModel, row: Row, keep: Sequence[int], device: str, least: int = 0, store: Store | None = None
) -> Tensor:
    """Logits (kept, vocabulary) of a row at the places `keep`; each token sees its own sequence.

    A row of fewer than `least` tokens is filled up, as a layer may compute few rows by another rule than many.
    `store` is given the keys and values of every layer.
    """
    inner = unwrapped(module)
    filling = max(0, least - len(row.ids))
    ids, positions = row.ids + [0] * filling, row.positions + [0] * filling
    plan = batches(row.pieces, len(ids), inner.config.get_text_config().num_attention_heads, inner.dtype, device)

    def attention(layer: Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if store:
            store(layer.layer_idx, key, value)  # type: ignore[arg-type]  # transformers numbers every attention layer
        return attend(query, key, value, scaling, plan)

    return run(module, ids, positions, keep, device, attention)


def run(
    module: PreTrainedModel,
    ids: Sequence[int],
    positions: Sequence[int],
    keep: Sequence[int],
    device: str,
    attention: Attend,
) -> Tensor:
    """Logits (kept, vocabulary) of one row of tokens that attend by `attention`, without a mask."""

    def of_a_row(
        layer: Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float | None = None, **_: object
    ) -> tuple[Tensor, None]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(layer, query[0], key[0], value[0], scaling)[None], None  # (1, tokens, heads, d)

    with exchanged(unwrapped(module), of_a_row):
        logits: Tensor = module(
            input_ids=torch.tensor([list(ids)]).to(device),
            position_ids=torch.tensor([list(positions)]).to(device),
            logits_to_keep=torch.tensor(list(keep)).to(device),
            use_cache=False,
        ).logits
    return logits[0]


def unwrapped(module: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside of a PEFT one."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def why_not(module: PreTrainedModel, device: str) -> str:
    """The reason to run sequences one by one in the model's own way; empty if there is none."""
    inner = unwrapped(module)
    if why := why_fixed(inner, ("layer_types",)):
        return why
    if not {"logits_to_keep", "position_ids"} <= set(inspect.signature(inner.forward).parameters):
        return "it takes no positions, or gives all logits or none"
    if module is not inner and module.active_peft_config.is_prompt_learning:
        return "its adapter puts tokens of its own before every text"
    return probe(module, device)


def probe(module: PreTrainedModel, device: str) -> str:
    """Run two sequences with a shared beginning together, each alone by the model itself, and one beside a third.

    Returns the reason not to run sequences together; empty if there is none.
    """
    vocabulary = unwrapped(module).config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second, exchanged_first = ids[:16], ids[:10] + ids[16:24], ids[:10] + ids[24:]
    with torch.inference_mode():
        together = _ends([first, second], module, device)
        alone = [module(input_ids=torch.tensor([s]).to(device), use_cache=False).logits[0, -1] for s in (first, second)]
        beside_another = _ends([exchanged_first, second], module, device)[1]
    own = torch.stack(alone).float()  # (sequences, vocabulary)
    if why := disagreement(together, own, TOLERANCE):
        return why
    # Nothing but the other sequence changed: what moves at all, beyond the last bits of a product, is a dependence.
    moved = float((together[1] - beside_another).abs().max() / own.abs().max())
    return f"on a probe a sequence beside another moves its logits by {moved:.1%}" if moved > SAME else ""


def _ends(sequences: Sequence[Sequence[int]], module: PreTrainedModel, device: str) -> Tensor:
    """The logits (sequences, vocabulary) after the last token of each sequence, all in one row in the order given."""
    row = Row()
    for i, sequence in enumerate(sequences):
        row.add(i, sequence, common(sequences[0], sequence) if i else 0)
    return forward(module, row, [places[-1] for places in row.places], device).float()

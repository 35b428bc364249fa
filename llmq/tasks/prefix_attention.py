"""Attention over a row of sequences that share their beginnings (`prefix_tree`).

Every query sees the keys of its own sequence, gathered in their order. A processor's bfloat16 products give each row of
a matrix the same bits whatever stands beside it, and keys that are masked at the end add exact zeros; so an output
depends on its own sequence alone, and neither sharing nor batch size changes a score.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmq.tasks.prefix_tree import Piece, Row, common

NAME = "llmq_prefixes"
STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SCORES = 2**24
"""Attention scores held at a time."""


@dataclass(frozen=True)
class Batch:
    """Pieces of like size, padded at their ends: indices into the row, and what each query may not see."""

    queries: Any
    """(pieces, queries); padding asks for the row's first token."""
    keys: Any
    """(pieces, keys)"""
    mask: Any
    """(pieces, 1, queries, keys), additive"""
    targets: Any
    """(pieces * queries); padding is written to a place after the row's end."""


def batches(pieces: Sequence[Piece], tokens: int, heads: int, dtype: Any, device: str) -> list[Batch]:
    """The pieces of a row of `tokens` tokens, those of like size together."""
    alike: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        size = next(s for s in STEPS if s >= piece.length)
        alike.setdefault((size, (len(piece.keys) - 1).bit_length()), []).append(piece)
    made = []
    for group in alike.values():
        widest = max(len(p.keys) for p in group) * max(p.length for p in group) * heads
        count = max(1, SCORES // widest)
        made += [_batch(group[i : i + count], tokens, dtype, device) for i in range(0, len(group), count)]
    return made


def _batch(pieces: Sequence[Piece], tokens: int, dtype: Any, device: str) -> Batch:
    import torch

    length, width = max(p.length for p in pieces), max(len(p.keys) for p in pieces)
    queries = [[*range(p.start, p.start + p.length), *[0] * (length - p.length)] for p in pieces]
    targets = [[*range(p.start, p.start + p.length), *[tokens] * (length - p.length)] for p in pieces]
    keys = [[*p.keys, *[0] * (width - len(p.keys))] for p in pieces]
    # What a padding query sees is of no matter, but it must see something.
    last = [[*range(p.first, p.first + p.length), *[p.first] * (length - p.length)] for p in pieces]
    hidden = torch.arange(width)[None, None] > torch.tensor(last)[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Batch(
        torch.tensor(queries).to(device),
        torch.tensor(keys).to(device),
        mask[:, None].to(device),
        torch.tensor(targets).flatten().to(device),
    )


def attend(query: Any, key: Any, value: Any, scaling: float, plan: Sequence[Batch]) -> Any:
    """`softmax(q k' scaling) v` for every query of the row over the keys of its own sequence.

    query (heads, tokens, d); key, value (groups, tokens, d), heads a multiple of groups. Returns (tokens, heads, d).
    """
    import torch

    heads, tokens, d = query.shape
    groups = key.shape[0]
    per_group = heads // groups
    scaled = (query * scaling).view(groups, per_group, tokens, d)
    out = query.new_zeros(tokens + 1, heads, value.shape[-1])
    for batch in plan:
        count, length = batch.queries.shape
        q = scaled[:, :, batch.queries].transpose(1, 2).reshape(groups, count, per_group * length, d)
        scores = q @ key[:, batch.keys].transpose(-1, -2)
        scores = scores.view(groups, count, per_group, length, -1) + batch.mask
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = weights.view(groups, count, per_group * length, -1) @ value[:, batch.keys]
        mixed = mixed.view(groups, count, per_group, length, -1).permute(1, 3, 0, 2, 4)
        out[batch.targets] = mixed.reshape(count * length, heads, -1)
    return out[:tokens]


Attend = Callable[[Any, Any, Any, Any, float], Any]
"""(module of the layer, query, key, value, scaling) -> (tokens, heads, d)"""
Store = Callable[[int, Any, Any], None]
"""(number of the layer, keys, values), each (groups, tokens, d)"""


@contextmanager
def exchanged(model: Any, attention: Attend) -> Iterator[None]:
    """Let a transformers model attend by `attention`, over one row without a mask."""
    from transformers import AttentionInterface

    def called(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(module, query[0], key[0], value[0], scaling)[None], None

    stock = model.config._attn_implementation
    AttentionInterface.register(NAME, called)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
        AttentionInterface._global_mapping.pop(NAME)


def forward(module: Any, row: Row, keep: Sequence[int], device: str, least: int = 0, store: Store | None = None) -> Any:
    """Logits (kept, vocabulary) of a row at the places `keep`, each token seeing its own sequence.

    `least`: rows shorter than that are filled up, where a layer computes few rows by another rule than many.
    `store` is given every layer's keys and values.
    """
    inner = unwrapped(module)
    filling = max(0, least - len(row.ids))
    ids, positions = row.ids + [0] * filling, row.positions + [0] * filling
    plan = batches(row.pieces, len(ids), inner.config.get_text_config().num_attention_heads, inner.dtype, device)

    def attention(layer: Any, query: Any, key: Any, value: Any, scaling: float) -> Any:
        if store:
            store(layer.layer_idx, key, value)
        return attend(query, key, value, scaling, plan)

    return run(module, ids, positions, keep, device, attention)


def run(
    module: Any, ids: Sequence[int], positions: Sequence[int], keep: Sequence[int], device: str, attention: Attend
) -> Any:
    """Logits (kept, vocabulary) of one row of tokens that attend by `attention`."""
    import torch

    with exchanged(unwrapped(module), attention):
        made = module(
            input_ids=torch.tensor([list(ids)]).to(device),
            position_ids=torch.tensor([list(positions)]).to(device),
            logits_to_keep=torch.tensor(list(keep)).to(device),
            use_cache=False,
        )
    return made.logits[0]


def unwrapped(module: Any) -> Any:
    """The transformers model inside of a PEFT one."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


SPECIAL = ("attn_logit_softcapping", "attention_chunk_size", "layer_types", "sliding_window")

SAME = 1e-6
"""How far logits may move, relative to the largest, by the rounding of float32."""


def why_not(module: Any, device: str) -> str:
    """Why the sequences of this model must be run one by one in its own way; empty if they need not."""
    import inspect

    inner = unwrapped(module)
    config = inner.config.get_text_config()
    for special in SPECIAL:
        value = getattr(config, special, None)
        if value and set(value if isinstance(value, list) else [value]) != {"full_attention"}:
            return f"its attention has {special}"
    if not getattr(inner, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    if not {"logits_to_keep", "position_ids"} <= set(inspect.signature(inner.forward).parameters):
        return "it takes no positions, or gives all logits or none"
    if module is not inner and module.active_peft_config.is_prompt_learning:
        return "its adapter puts tokens of its own before every text"
    return _differs(module, device)


def _differs(module: Any, device: str) -> str:
    """A probe: two sequences that share their beginning, together and by the model itself; and one beside another."""
    import torch

    vocabulary = unwrapped(module).config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second, exchanged_first = ids[:16], ids[:10] + ids[16:24], ids[:10] + ids[24:]
    with torch.inference_mode():
        together = _ends([first, second], module, device)
        alone = [module(input_ids=torch.tensor([s]).to(device), use_cache=False).logits[0, -1] for s in (first, second)]
        beside_another = _ends([exchanged_first, second], module, device)[1]
    expected = torch.stack(alone).float()
    apart = float((together - expected).abs().max() / expected.abs().max())
    if not apart <= 0.05:
        return f"on a probe its logits differ by {apart:.1%}"
    # Nothing but the other sequence changed: what moves at all, beyond the last bits of a product, is a dependence.
    moved = float((together[1] - beside_another).abs().max() / expected.abs().max())
    return f"on a probe a sequence beside another moves its logits by {moved:.1%}" if moved > SAME else ""


def _ends(sequences: Sequence[Sequence[int]], module: Any, device: str) -> Any:
    """The logits (sequences, vocabulary) after the last token of each, of all in one row in the order given."""
    row = Row()
    for i, sequence in enumerate(sequences):
        row.add(i, sequence, common(sequences[0], sequence) if i else 0)
    return forward(module, row, [places[-1] for places in row.places], device).float()

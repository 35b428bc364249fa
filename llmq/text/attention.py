"""Attention in place of a transformers model's own, where both give the same: causal by tiles, and within examples.

On a processor plain products over tiles are three times as fast as the fused kernel; a card takes the kernel. A
block-diagonal mask would score every token of a packed row against every other and discard most scores; here each
example is a product of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    Attention = Callable[..., tuple[Tensor, None]]
    """(layer, query, key, value, mask, **settings) -> (rows, tokens, heads, d), and no weights."""

NAME = "llmq"
"""The name under which transformers finds the attention that `exchanged` registers."""
TILE = 128
"""Queries of a tile. Scores of keys after the tile are not computed."""
SPECIAL = ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")
"""Configuration settings of attention other than a plain causal softmax over all earlier tokens."""
SPECIAL_IN_A_CALL = ("softcap", "position_bias", "is_causal", "s_aux", "cache")
"""Arguments by which transformers asks a layer for such attention."""

Segment = tuple[int, int, int]
"""Row, first token, end."""


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """`softmax(q k' scaling) v`, each query seeing the keys up to its own place.

    query (rows, heads, tokens, d); key, value (rows, groups, tokens, d), heads a multiple of groups.
    Returns (rows, heads, tokens, d). Scores are rounded to the inputs' dtype, as in transformers' eager attention.
    """
    import torch

    from llmq.text.rounded_softmax import RoundedSoftmax

    rows, heads, tokens, d = query.shape
    groups = key.shape[1]
    per_group = heads // groups
    scaled = (query * scaling).view(rows, groups, per_group, tokens, d)
    keys = key.transpose(-1, -2)  # (rows, groups, d, tokens)
    future = torch.full((TILE, TILE), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    tiles = []
    for start in range(0, tokens, TILE):
        end = min(start + TILE, tokens)
        count = end - start
        # The heads of a group share their keys: one product for all of them.
        folded = scaled[..., start:end, :].reshape(rows, groups, per_group * count, d)  # heads outside, queries inside
        scores = (folded @ keys[..., :end]).view(rows, groups, per_group, count, end)
        scores[..., start:] += future[:count, :count]  # only the tile's own keys can lie ahead
        weights: Tensor = RoundedSoftmax.apply(scores, value.dtype)  # (rows, groups, per_group, count, end)
        mixed = weights.view(rows, groups, per_group * count, end) @ value[..., :end, :]
        tiles.append(mixed.view(rows, heads, count, value.shape[-1]))  # head = group * per_group + place in the group
    return torch.cat(tiles, 2)


def fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The same by one kernel of PyTorch's, which keeps no scores for the gradient; for cards, where it is fast."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def segments_of(position_ids: Tensor) -> list[Segment]:
    """The examples of a packed batch: one begins wherever the positions begin anew. `position_ids`: (rows, tokens)."""
    segments: list[Segment] = []
    for row, positions in enumerate(position_ids.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0 or i == 0]
        segments += [(row, start, end) for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return segments


def within_segments(query: Tensor, key: Tensor, value: Tensor, scaling: float, segments: Sequence[Segment]) -> Tensor:
    """Causal attention within each segment; shapes as in `causal`.

    Returns (rows, tokens, heads, d), contiguous as transformers' own: some models (JetMoE) take a view of it.
    """
    import torch

    rows, _, tokens, _ = query.shape
    within = causal if query.device.type == "cpu" else fused
    if len(segments) == rows and all(end - start == tokens for _, start, end in segments):
        return within(query, key, value, scaling).transpose(1, 2).contiguous()  # one example a row: nothing to cut
    parts = []
    for row, start, end in segments:
        q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
        parts.append(within(q, k, v, scaling))  # (1, heads, tokens of the segment, d)
    joined = torch.cat(parts, dim=2).transpose(1, 2).contiguous()  # (1, all tokens of all rows, heads, d)
    return joined.reshape(rows, tokens, *joined.shape[2:])


@contextmanager
def exchanged(model: PreTrainedModel, attention: Attention, masked: bool = False) -> Iterator[None]:
    """Let a transformers model attend by `attention`; with `masked`, under the masks made for PyTorch's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    stock = model.config._attn_implementation
    around = AttentionInterface._global_mapping.get(NAME)  # of a student, while its teacher answers
    AttentionInterface.register(NAME, attention)
    if masked:
        AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
        AttentionInterface._global_mapping.pop(NAME)  # or it would keep the model in memory
        if around:
            AttentionInterface.register(NAME, around)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


@contextmanager
def tiled(model: PreTrainedModel) -> Iterator[None]:
    """Let a transformers model that uses the fused kernel attend by tiles where plain causal attention will do."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(
        layer: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **settings: object,
    ) -> tuple[Tensor, None]:
        special = settings.get("dropout") or any(settings.get(name) is not None for name in SPECIAL_IN_A_CALL)
        # With a cache there are more keys than queries, and a tile's triangle would lie elsewhere.
        same = query.shape[2] == key.shape[2] and query.device.type == "cpu"
        if mask is None and scaling is not None and same and not special and getattr(layer, "is_causal", False):
            return causal(query, key, value, scaling).transpose(1, 2), None
        kernel: Attention = sdpa_attention_forward
        return kernel(layer, query, key, value, mask, scaling=scaling, **settings)

    if model.config._attn_implementation == "sdpa":
        with exchanged(model, attend, masked=True):
            yield
    else:
        yield


def why_fixed(model: PreTrainedModel, special: Sequence[str]) -> str:
    """The reason why a model must keep its own attention, or an empty string. `special` names more such settings."""
    config = model.config.get_text_config()
    for name in (*SPECIAL, *special):
        value = getattr(config, name, None)
        if value and not (isinstance(value, list) and set(value) == {"full_attention"}):  # `layer_types`
            return f"its attention has {name}"
    return "" if getattr(model, "_supports_attention_backend", False) else "its attention cannot be exchanged"


def border(model: PreTrainedModel) -> int | None:
    """The length up to which LongRoPE (Phi-3) turns positions by its short table; None for any other model.

    A longer text turns the positions of its whole batch by the long table.
    """
    config = model.config.get_text_config()
    said = getattr(config, "rope_parameters", None) or {}
    tables = [table for table in (said, *said.values()) if isinstance(table, dict)]  # one, or one for a kind of layer
    name = "original_max_position_embeddings"
    ends = [table[name] for table in tables if table.get("rope_type") == "longrope" and name in table]
    return min(ends, default=None)


def crosses(model: PreTrainedModel, *lengths: int) -> bool:
    """True if texts of these lengths, or one text that grows from the first to the last, turn positions differently."""
    end = border(model)
    return end is not None and bool(lengths) and min(lengths) <= end < max(lengths)


def distance(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest expected output."""
    return float((outputs - expected).abs().max() / expected.abs().max())


def disagreement(outputs: Tensor, own: Tensor, tolerance: float) -> str:
    """The difference that an exchanged attention makes to outputs on a probe; an empty string within the tolerance."""
    apart = distance(outputs, own)
    return "" if apart <= tolerance else f"on a probe its outputs differ by {apart:.1%} from the model's own"

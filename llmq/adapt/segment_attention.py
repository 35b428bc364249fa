"""Causal attention over packed rows, each example by itself. Pure.

A block-diagonal mask would score every token of a row against every other and throw most away; here each example is a
small dense product of its own.
"""

from collections.abc import Sequence
from typing import Any

from llmq.attention import causal

Segment = tuple[int, int, int]
"""Row, first token, end."""


def segments_of(position_ids: Any) -> list[Segment]:
    """The examples in a packed batch: each begins where its positions begin. `position_ids`: (rows, tokens)."""
    found: list[Segment] = []
    for row, positions in enumerate(position_ids.tolist()):
        starts = [i for i, p in enumerate(positions) if p == 0 or i == 0]
        found += [(row, start, end) for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return found


def attend(query: Any, key: Any, value: Any, scaling: float, segments: Sequence[Segment]) -> Any:
    """`softmax(q k' scaling) v` within each segment, causally.

    query (rows, heads, tokens, d); key, value (rows, groups, tokens, d), heads a multiple of groups.
    Returns (rows, tokens, heads, d), contiguous as transformers' own: some models (JetMoE) take a view of it.
    """
    import torch

    rows, _, tokens, _ = query.shape
    if len(segments) == rows and all(end - start == tokens for _, start, end in segments):
        return causal(query, key, value, scaling).transpose(1, 2).contiguous()
    parts = []
    for row, start, end in segments:
        q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
        parts.append(causal(q, k, v, scaling))
    joined = torch.cat(parts, dim=2).transpose(1, 2).contiguous()
    return joined.reshape(rows, tokens, *joined.shape[2:])

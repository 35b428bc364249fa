"""Foretold costs of layers, corrected by the divergence that rounding them makes at the end of the model.

A cost adds up squares of gradients and errors over all outputs. Where a few tokens have massive activations it is too
large by far: the norm after the layer takes them back. So the layers with the largest costs are rounded one by one and
measured, the others kind by kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from llmq.terminal import track
from llmq.text.loss_weights import block_by_block

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.text.skeleton import Skeleton

ALONE = 10
"""Layers that are measured one by one."""
MOST = 30.0
"""The largest factor, and the reciprocal of the least: a divergence near 0 is noise."""


def corrections(
    source: Skeleton, rounded: Callable[[str], Tensor], costs: Mapping[str, float], windows: Sequence[Sequence[int]]
) -> dict[str, float]:
    """By layer the measured divergence over the foretold `costs` of the weights `rounded(layer)`, on some windows.

    `source` is a skeleton of its own, without weights.
    """
    alone = sorted(costs, key=lambda name: -costs[name])[:ALONE]
    together: dict[str, list[str]] = {}
    for name in costs:
        if name not in alone:
            together.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(name)
    groups = [*([name] for name in alone), *together.values()]
    factors: dict[str, float] = {}
    for group, measured in zip(groups, _divergences(source, rounded, groups, windows), strict=True):
        foretold = sum(costs[name] for name in group)
        factor = min(MOST, max(1 / MOST, measured / foretold)) if foretold else 1.0
        factors |= dict.fromkeys(group, factor)
    return factors


def _divergences(
    source: Skeleton,
    rounded: Callable[[str], Tensor],
    groups: Sequence[Collection[str]],
    windows: Sequence[Sequence[int]],
) -> list[float]:
    """The mean divergence from the untouched model in nats a token, with each group of layers rounded alone."""
    import torch

    chosen: Collection[str] = ()

    def load(block: str) -> None:
        source.load(block)
        for name in source.linears(block):
            if name in chosen:
                source.set(f"{name}.weight", rounded(name).to(source.device, source.dtype))

    def outputs() -> list[Tensor]:
        ids = (torch.tensor([window], device=source.device) for window in windows)
        return [source.module(input_ids=each, use_cache=False).logits[0].float().log_softmax(-1) for each in ids]

    made = []
    with torch.no_grad(), block_by_block(source, load):
        base = outputs()  # (tokens, vocabulary) each
        for group in track(groups, "measured"):
            chosen = group
            apart = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(base, outputs(), strict=True)]
            made.append(max(0.0, float(torch.stack(apart).mean())))
    return made

"""Foretold costs of layers, corrected by gradients of single tokens and by divergences at the end of the model.

A cost adds up squares of gradients and errors over all outputs, as if outputs erred independently. Where a few tokens
have massive activations it is too large by far: the norm after the layer takes the error back. So for a few windows the
gradient of each token is multiplied by the error of that very token. Errors of few bits harm more than squares tell,
so each number of bits is measured once, with all layers rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmq.terminal import track
from llmq.text.loss_weights import block_by_block, loss_of_next

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.text.skeleton import Skeleton

Rounded = Callable[[str], "Tensor"]
"""The rounded weight `(outputs, inputs)` of a layer."""
MOST = 30.0
"""The largest factor, and the reciprocal of the least: a divergence near 0 is noise."""


def corrections(
    source: Skeleton,
    rounded: Mapping[int, Rounded],
    costs: Mapping[int, Mapping[str, float]],
    middle: int,
    windows: Sequence[Sequence[int]],
) -> dict[int, dict[str, float]]:
    """By bits and layer the factor of the foretold `costs` of the weights `rounded[bits](layer)`, from some windows.

    Layers are set against one another at the bits `middle`. `source` is a skeleton of its own, without weights.
    """
    harms = harms_of(source, rounded[middle], list(costs[middle]), windows)
    by_layer = {name: _factor(harm, costs[middle][name]) for name, harm in harms.items()}
    measured = divergences(source, list(rounded.values()), windows)
    factors = {}
    for bits, divergence in zip(rounded, measured, strict=True):
        whole = _factor(divergence, sum(by_layer[name] * cost for name, cost in costs[bits].items()))
        factors[bits] = {name: whole * by_layer[name] for name in costs[bits]}
    return factors


def _factor(measured: float, foretold: float) -> float:
    return min(MOST, max(1 / MOST, measured / foretold)) if foretold else 1.0


def harms_of(
    source: Skeleton, rounded: Rounded, layers: Sequence[str], windows: Sequence[Sequence[int]]
) -> dict[str, float]:
    """By layer half the mean over tokens of `(g e)²`: the gradient at the layer's outputs times their error."""
    import torch

    sums = dict.fromkeys(layers, 0.0)
    inputs: dict[str, Tensor] = {}  # (tokens, inputs)
    gradients: dict[str, Tensor] = {}  # (tokens, outputs)
    backward = False

    def meet(layer: str) -> None:
        """The last layer of a block has its gradient first: inputs are known once the block is computed again."""
        if layer in inputs and layer in gradients:
            weight = source.tensor(f"{layer}.weight")
            assert weight is not None  # the block was loaded from the same files
            errors = inputs.pop(layer).float() @ (rounded(layer).to(weight.device) - weight.float()).t()
            sums[layer] += float((errors * gradients.pop(layer).float()).sum(-1).square().sum())

    def on_gradient(layer: str, gradient: Tensor) -> None:
        gradients[layer] = gradient.flatten(0, -2)
        meet(layer)

    def before(layer: str, module: Module, args: tuple[Tensor, ...]) -> None:
        if backward:
            inputs[layer] = args[0].detach().flatten(0, -2)
            meet(layer)

    def after(layer: str, module: Module, args: object, output: Tensor) -> None:
        if not backward and output.requires_grad:
            output.register_hook(partial(on_gradient, layer))  # type: ignore[no-untyped-call]

    hooks = [source.linear(layer).register_forward_pre_hook(partial(before, layer)) for layer in layers]
    hooks += [source.linear(layer).register_forward_hook(partial(after, layer)) for layer in layers]
    with block_by_block(source):
        for window in track(windows, "gradients"):
            loss = loss_of_next(source, torch.tensor([window], device=source.device))
            backward = True
            torch.autograd.backward(loss)
            backward = False
            inputs.clear()
            gradients.clear()
    for hook in hooks:
        hook.remove()
    return {layer: total / 2 / sum(map(len, windows)) for layer, total in sums.items()}


def divergences(source: Skeleton, rounded: Sequence[Rounded], windows: Sequence[Sequence[int]]) -> list[float]:
    """The mean divergence from the untouched model in nats a token, with all layers rounded in each of the ways."""
    import torch

    chosen: Rounded | None = None

    def load(block: str) -> None:
        source.load(block)
        for name in source.linears(block) if chosen else ():
            assert chosen
            source.set(f"{name}.weight", chosen(name).to(source.device, source.dtype))

    sums = [0.0] * len(rounded)
    with torch.no_grad(), block_by_block(source, load):
        for window in track(windows, "measured"):
            chosen = None
            base = _log_shares(source, window)
            for i, way in enumerate(rounded):
                chosen = way
                sums[i] += _divergence(base, _log_shares(source, window))
    return [max(0.0, total / len(windows)) for total in sums]


def divergence_of(changed: Skeleton, base: Skeleton, windows: Sequence[Sequence[int]]) -> float:
    """The mean divergence of a changed model from its base in nats a token; both are skeletons without weights."""
    import torch

    with torch.no_grad(), block_by_block(base), block_by_block(changed):
        apart = [_divergence(_log_shares(base, w), _log_shares(changed, w)) for w in track(windows, "measured")]
    return max(0.0, sum(apart) / len(apart))


def _log_shares(source: Skeleton, window: Sequence[int]) -> Tensor:
    """The logarithms of the shares of all tokens `(tokens, vocabulary)` after each token of a window."""
    import torch

    ids = torch.tensor([window], device=source.device)
    logits: Tensor = source.module(input_ids=ids, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())

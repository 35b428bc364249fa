"""The weight of each calibration token in each layer: the squared gradient of the loss at the outputs of the layer.

A Gram matrix of rows weighted so measures how much an error of a layer harms the loss, not how far it moves the outputs
(GuidedQuant, Kim et al. 2025; YAQA, Tseng et al. 2025). The loss is that of the next token in the text: tokens drawn
from the model in its place gave no other divergence (1.02 times, 95 % 0.95 to 1.15). The gradient goes backward through
one block at a time: each is loaded again, and computed again from its input. So memory holds one block with its
activations, and of one batch the inputs of all blocks and the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from llmq import together
from llmq.environment import own_device
from llmq.errors import LlmqError, UserError
from llmq.terminal import track
from llmq.text.attention import tiled

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from llmq.text.skeleton import Skeleton
    from llmq.types import Loaded

Batch = Sequence[Sequence[int]]  # token ids (windows, tokens)


def loss_weights(source: Skeleton, layers: Collection[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The weights `(tokens of all batches,)` of each layer, in float32; all 0 where no gradient comes.

    `source` is a skeleton of its own, without weights. Raises `UserError` for a layer that does not see every token
    once, `LlmqError` for a gradient that is not finite.
    """
    import torch

    if all(len(window) < 2 for batch in batches for window in batch):
        raise UserError("windows of one token have no next token whose loss weighs anything; set length to 2 or more")
    again = partial(type(source), source.folder, source.dtype_name)
    work = partial(_share_of_squares, again, source.device, tuple(layers), batches)
    parts = together.answers_of(work, [], partial(_squares, source, layers, batches))
    weights = {layer: torch.cat([squares[layer] for squares in parts]) for layer in layers}
    for layer, squares in weights.items():
        if not bool(squares.isfinite().all()):
            raise LlmqError(f"{layer}: the gradient of the loss is not finite; set the model's dtype to float32")
    return weights


def _share_of_squares(
    skeleton: Callable[[str], Skeleton],
    device: str,
    layers: Collection[str],
    batches: Sequence[Batch],
    models: Sequence[Loaded],
    share: together.Share,
) -> dict[int, dict[str, Tensor]]:
    return _squares(skeleton(own_device(device)), layers, batches, share)


def _squares(
    source: Skeleton, layers: Collection[str], batches: Sequence[Batch], share: together.Share
) -> dict[int, dict[str, Tensor]]:
    """The squared gradients of a share of the batches."""
    import torch

    found: dict[int, dict[str, Tensor]] = {}
    with block_by_block(source):
        for i in track(list(share.of(range(len(batches)))), "gradients"):
            ids = torch.tensor(batches[i], device=source.device)  # (windows, tokens)
            squares = _squared_gradients(source, layers, ids)
            found[i] = {layer: each.cpu() for layer, each in squares.items()}
    return found


def of_mean_one(weights: Tensor) -> Tensor:
    """Weights divided by their mean: equal ones become 1, exactly."""
    mean = weights.double().mean()
    return (weights.double() / mean).float() if float(mean) else weights


def _squared_gradients(source: Skeleton, layers: Collection[str], ids: Tensor) -> dict[str, Tensor]:
    """The mean square of the gradient of each layer's outputs, `(tokens,)` each, for one batch `(windows, tokens)`."""
    import torch

    rows = dict.fromkeys(layers, 0)
    found = {layer: torch.zeros(ids.numel(), device=ids.device) for layer in layers}

    def note(layer: str, gradient: Tensor) -> None:  # (..., outputs)
        found[layer] = gradient.float().square().mean(-1).flatten()

    def watch(layer: str, module: Module, args: object, output: Tensor) -> None:
        rows[layer] += output.numel() // output.shape[-1]
        if output.requires_grad:
            output.register_hook(partial(note, layer))  # type: ignore[no-untyped-call]

    hooks = [source.linear(layer).register_forward_hook(partial(watch, layer)) for layer in layers]
    loss = loss_of_next(source, ids)
    for hook in hooks:  # or blocks would be counted anew when they are computed again
        hook.remove()
    if odd := [layer for layer in layers if rows[layer] != ids.numel()]:
        raise UserError(
            f"{odd[0]} of {source.config.model_type} sees {rows[odd[0]]} rows for {ids.numel()} tokens, and the loss "
            "weighs each token once in each layer; leave such layers out by modules, or use hessian: inputs"
        )
    torch.autograd.backward(loss)
    return found


def loss_of_next(source: Skeleton, ids: Tensor) -> Tensor:
    """The summed loss of the next tokens of windows `(windows, tokens)`; nothing follows the last one of a window."""
    import torch

    logits = source.module(input_ids=ids, use_cache=False).logits  # (windows, tokens, vocabulary)
    ahead, wanted = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(ahead, wanted, reduction="sum")


@contextmanager
def block_by_block(source: Skeleton, load: Callable[[str], None] | None = None) -> Iterator[None]:
    """Let the model of a skeleton without weights run, and its gradients go back, with one block in memory.

    `load` gives a block its weights, in place of the skeleton's own.
    """
    source.load_outside()
    for block in source.blocks:
        _load_when_called(source, block, load or source.load)
    source.module.enable_input_require_grads()
    try:
        with tiled(source.module):
            yield
    finally:
        source.module.disable_input_require_grads()
        for block in source.blocks:
            del source.module.get_submodule(block).forward  # the class has its own


def _load_when_called(source: Skeleton, block: str, load: Callable[[str], None]) -> None:
    from torch.utils.checkpoint import checkpoint

    module = source.module.get_submodule(block)
    forward: Callable[..., object] = module.forward

    def loaded(*args: object, **kwargs: object) -> object:
        load(block)
        try:
            return forward(*args, **kwargs)
        finally:  # being computed again ends with an error, as soon as everything is known
            for name, tensor in source.held(block).items():
                source.set(name, tensor.to("meta"))

    def kept(*args: object, **kwargs: object) -> object:
        called = partial(loaded, **kwargs)
        return checkpoint(called, *args, use_reentrant=False, preserve_rng_state=False)

    module.forward = kept

"""Whether what stands beside an example changes what the model makes of it. The model is asked, by no list of names."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from llmq.errors import LlmqError

LENGTH = 12
"""Tokens of an example of the probe."""
EXACT, OF_THE_BATCH = 0.0, 0.05
"""How far outputs may move, relative to the largest: packed not at all. LLM.int8() looks for its outliers in all tokens
of a batch, and beside padding a card may multiply more rows by another rule; of neither comes a gradient."""
ROUNDING = 0.05
"""How far the outputs of an example may be, packed and alone, in their norm; bfloat16 alone makes a fifth of it."""

Run = Callable[[Any, Any], Any]
"""(token ids, positions), each (rows, tokens) -> outputs (rows, tokens, any)"""


def neighbours_reach(model: Any, run: Run, packed: bool, autocast: Any = None) -> str:
    """How an example depends on the others of its batch while the model trains; empty if it does not.

    Packed: it is the second of three in a row. Else it is the first, and padding follows. A second row lies below. All
    tokens but its own are exchanged: packed, its outputs must be the same to the last bit, and those of it alone but
    for rounding; and no gradient may reach the others' embeddings.
    """
    import torch

    device = next(model.get_input_embeddings().parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary, (2, 2, 3 * LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    ids, other = drawn[0], drawn[1]  # (2 rows, tokens)
    own = slice(LENGTH, 2 * LENGTH) if packed else slice(0, LENGTH)
    other[0, own] = ids[0, own]
    lengths = (LENGTH, LENGTH, LENGTH) if packed else (LENGTH, 2 * LENGTH)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).to(device)

    def outputs(tokens: Any) -> Any:
        with torch.random.fork_rng(), autocast or nullcontext():
            torch.manual_seed(0)  # the same dropout each time
            return run(tokens, positions)[0, own].float()

    before = model.training
    model.train()
    try:
        moved = _moved(outputs, ids, other, EXACT if packed and not _is_int8(model) else OF_THE_BATCH)
        if moved or _gradient_reaches(model, outputs, ids, own):
            return moved or "its gradient reaches the tokens of others"
        model.eval()
        return _differs_alone(run, ids, positions, own) if packed else ""
    finally:
        model.train(before)


def _moved(outputs: Callable[[Any], Any], ids: Any, other: Any, tolerance: float) -> str:
    import torch

    with torch.no_grad():
        one, two = outputs(ids), outputs(other)
    if not bool(one.isfinite().all()):
        raise LlmqError(
            "the model gives outputs that are not finite before anything was trained; its weights are broken"
        )
    moved = float((one - two).abs().max() / one.abs().max())
    return "" if moved <= tolerance else f"its outputs move by {moved:.2g} of the largest when the others change"


def _gradient_reaches(model: Any, outputs: Callable[[Any], Any], ids: Any, own: slice) -> bool:
    import torch

    embedded: list[Any] = []

    def watched(layer: Any, given: Any, made: Any) -> Any:
        embedded.append(made.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(watched)
    try:
        made = outputs(ids)
    finally:
        hook.remove()
    direction = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made.device)
    (gradient,) = torch.autograd.grad((made * direction).sum(), embedded[0])  # (rows, tokens, d)
    gradient = gradient.clone()
    gradient[0, own] = 0
    return bool((gradient != 0).any())


def _differs_alone(run: Run, ids: Any, positions: Any, own: slice) -> str:
    """A model that counts positions from the row's beginning keeps examples apart, and reads the second as a later."""
    import torch

    with torch.no_grad():
        together = run(ids, positions)[0, own].float()
        alone = run(ids[:1, own], positions[:1, own])[0].float()
    apart = float((together - alone).norm() / alone.norm())
    return "" if apart <= ROUNDING else f"its outputs are {apart:.2g} of their norm away from those of it alone"


def _is_int8(model: Any) -> bool:
    return any(type(layer).__name__ == "Linear8bitLt" for layer in model.modules())

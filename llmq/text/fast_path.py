"""Faster attention and loss for training, used only if they give the same as the model's own.

A probe of the model itself, not a list of names, tells whether examples reach one another, packed or beside padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn

from llmq import processes
from llmq.environment import forked_random
from llmq.errors import LlmqError, UserError
from llmq.text.attention import Segment, disagreement, distance, exchanged, segments_of, why_fixed, within_segments
from llmq.text.examples import IGNORED
from llmq.text.fused_loss import Taught, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROPOUTS = ("attention_dropout", "attn_pdrop")
TOLERANCE = 0.02
"""Largest relative difference of the two losses on a probe; bfloat16 alone makes a tenth of it."""
LENGTH = 12
"""Tokens of an example in a probe."""
EXACT, OF_THE_BATCH = 0.0, 0.05
"""Outputs may move by this share of the largest: packed not at all. LLM.int8() looks for outliers in all tokens of a
batch, and a card may multiply more rows by another kernel; neither passes a gradient from example to example."""
ROUNDING = 0.05
"""Outputs of an example, packed and alone, may differ by this share of their norm; bfloat16 makes a fifth of it."""

Outputs = Callable[[Tensor], Tensor]
"""Token ids (rows, tokens) -> outputs of the probed example (tokens, any)."""


class FastPath:
    """Attention within examples, and a loss without logits in memory, switched onto a model for its training."""

    def __init__(self, model: PeftModel | PreTrainedModel):
        self.model = model
        self.inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.head = self.inner.get_output_embeddings()
        self.segments: list[Segment] = []
        self.told: Callable[[Tensor], Taught] | None = None
        """The tokens (rows, tokens) that are learned -> a teacher's answers to them."""

    def see(self, position_ids: Tensor) -> None:
        """Note the places of the examples in the next batch. `position_ids`: (rows, tokens)."""
        self.segments = segments_of(position_ids)

    def _attention(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        return within_segments(query, key, value, scaling, self.segments), None

    def _loss(
        self, logits: Tensor, *_: object, shift_labels: Tensor, num_items_in_batch: Tensor | None = None, **__: object
    ) -> Tensor:
        # `logits` are hidden states (rows, tokens, d) here: while switched on, the head returns its input.
        taught = self.told(shift_labels != IGNORED) if self.told else None
        total = linear_cross_entropy(logits.flatten(0, -2), self.head, shift_labels.flatten(), IGNORED, taught)
        return total / total_over(shift_labels, num_items_in_batch)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Let the model attend within examples, and compute its loss without logits."""
        stock_loss = self.inner.loss_function
        with exchanged(self.inner, self._attention):
            self.inner.loss_function = self._loss
            self.head.forward = lambda hidden: hidden  # `_loss` multiplies by the head, a few rows at a time
            try:
                yield
            finally:
                self.inner.loss_function = stock_loss
                del self.head.forward  # of the instance: the method of the class comes back

    def why_not(self) -> str:
        """The reason why this model must train by its own attention and loss, or an empty string."""
        if type(self.head) is not torch.nn.Linear:
            return "the output head is no plain linear layer"
        if why := why_fixed(self.inner, DROPOUTS):
            return why
        if processes.sharding():
            return "the output head is sharded"
        return self._probe()

    def neighbours_reach(self, packed: bool, switched_on: bool, autocast: AbstractContextManager[object]) -> str:
        """The way in which an example depends on its batch, by this path or by the model's own, or an empty string.

        A packed example is the second of three in a row; any other is the first, and padding follows. A second row lies
        below. All tokens but those of the example are exchanged. The outputs of a packed example must stay the same to
        the last bit, and equal those of the example alone but for rounding; no gradient may reach other embeddings.
        """
        ids, other = self._random_ids(2, 2, 3 * LENGTH)  # (2 rows, tokens) each
        own = slice(LENGTH, 2 * LENGTH) if packed else slice(0, LENGTH)
        other[0, own] = ids[0, own]
        lengths = (LENGTH, LENGTH, LENGTH) if packed else (LENGTH, 2 * LENGTH)
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).to(ids.device)

        def run(ids: Tensor, positions: Tensor) -> Tensor:
            self.see(positions)
            outputs: Tensor = self.model(input_ids=ids, position_ids=positions).logits
            return outputs

        def trained(tokens: Tensor) -> Tensor:
            with forked_random(str(ids.device)), autocast:
                torch.manual_seed(0)  # the same dropout each time
                return run(tokens, positions)[0, own].float()  # (tokens of the example, vocabulary or d)

        before = self.model.training
        self.model.train()
        try:
            with self.switched_on() if switched_on else nullcontext():
                moved = _moved(trained, ids, other, EXACT if packed and not self._is_int8() else OF_THE_BATCH)
                if moved or _gradient_reaches(self.model.get_input_embeddings(), trained, ids, own):
                    return moved or "its gradient reaches the tokens of others"
                if not packed:
                    return ""
                self.model.eval()
                with torch.no_grad():
                    together = run(ids, positions)[0, own].float()
                    alone = run(ids[:1, own], positions[:1, own])[0].float()
        finally:
            self.model.train(before)
        # A model may keep examples apart and yet count positions from the row's beginning: this tells.
        apart = float((together - alone).norm() / alone.norm())
        return "" if apart <= ROUNDING else f"its outputs are {apart:.2g} of their norm away from those of it alone"

    def _is_int8(self) -> bool:
        return any(type(layer).__name__ == "Linear8bitLt" for layer in self.model.modules())

    def _random_ids(self, *shape: int) -> Tensor:
        vocabulary = self.model.config.get_text_config().vocab_size
        device = next(self.model.get_input_embeddings().parameters()).device
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def _probe(self) -> str:
        """The difference of this path's loss from the model's own on two random examples, or an empty string.

        What a model makes of the logits (a scale, a cap) would be made of the hidden states; small random weights give
        about the same loss all the same, and other gradients.
        """
        ids = self._random_ids(2, LENGTH)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)  # (2, tokens), shifted
        positions = torch.arange(LENGTH, device=ids.device).expand(2, -1)
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "shift_labels": labels}
        training = self.model.training
        self.model.eval()
        self.see(positions)
        handed: list[Tensor] = []  # hidden states, by the head
        hook = self.head.register_forward_hook(lambda head, given, made: handed.append(made))
        with torch.no_grad():
            with self.switched_on():
                fast = self.model(**batch)
            hook.remove()
            stock = self.model(**batch).loss
        self.model.train(training)
        if not torch.equal(fast.logits.float(), handed[0].float()):
            return "its logits are changed after the output head"
        return disagreement(fast.loss, stock, TOLERANCE)


def total_over(labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """The number of tokens that a summed loss is divided by: those of all accumulated batches, or of these labels."""
    return (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch


def _moved(outputs: Outputs, ids: Tensor, other: Tensor, tolerance: float) -> str:
    with torch.no_grad():
        one, two = outputs(ids), outputs(other)
    if not bool(one.isfinite().all()):
        raise LlmqError(
            "the model gives outputs that are not finite before anything was trained; its weights are broken"
        )
    moved = distance(two, one)
    return "" if moved <= tolerance else f"its outputs move by {moved:.2g} of the largest when the others change"


def _gradient_reaches(embeddings: nn.Module, outputs: Outputs, ids: Tensor, own: slice) -> bool:
    embedded: list[Tensor] = []

    def watch(layer: nn.Module, given: object, made: Tensor) -> Tensor:
        embedded.append(made.detach().requires_grad_())
        return embedded[-1]

    hook = embeddings.register_forward_hook(watch)
    try:
        made = outputs(ids)
    finally:
        hook.remove()
    # A random direction, since a plain sum can be blind: the values of a LayerNorm add up to 0 for any input.
    direction = torch.randn(made.shape, generator=torch.Generator().manual_seed(0)).to(made.device)
    (gradient,) = torch.autograd.grad((made * direction).sum(), embedded[0])  # (rows, tokens, d)
    gradient = gradient.clone()
    gradient[0, own] = 0
    return bool((gradient != 0).any())


@dataclass(frozen=True)
class Way:
    """A way to train: on the fast path or the model's own, several examples to a row or one; and the reasons."""

    fast: FastPath | None
    packing: bool
    why_slow: str
    why_unpacked: str


def choose(
    model: PeftModel | PreTrainedModel,
    packing: bool,
    batch_size: int,
    autocast: AbstractContextManager[object] | None = None,
) -> Way:
    """The fastest way to train in which no example depends on another, by probes of the model itself.

    Raises `UserError` if the rows of a batch, or their padding, reach one another even with one example a row.
    """
    fast = FastPath(model)
    slow = fast.why_not()
    reaches: dict[tuple[bool, bool], str] = {}  # (packed, fast) -> dependence of an example on its batch
    for packed in (True, False) if packing else (False,):
        for is_fast in (True, False) if not slow else (False,):
            reaches[packed, is_fast] = fast.neighbours_reach(packed, is_fast, autocast or nullcontext())
            if not reaches[packed, is_fast]:
                why_slow = slow or reaches.get((packed, True), "")
                return Way(fast if is_fast else None, packed, why_slow, reaches.get((True, False), ""))
    if batch_size > 1:
        raise UserError(
            f"an example depends on the padding and the other rows of its batch ({reaches[False, False]}); "
            "set per_device_train_batch_size: 1"
        )
    # A batch of one row has no padding and no other rows.
    return Way(None if slow else fast, False, slow, reaches.get((True, False), ""))

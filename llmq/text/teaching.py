"""The untouched base as the teacher of a training: it answers each batch beside the student (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.text.examples import IGNORED
from llmq.text.fast_path import FastPath, total_over
from llmq.text.fused_loss import Taught, cross_entropy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Teacher:
    """An open model that answers batches; `alpha` and `temperature` are those of `Taught`."""

    def __init__(self, module: PreTrainedModel, alpha: float, temperature: float):
        self.module, self.alpha, self.temperature = module.eval(), alpha, temperature
        module.config.use_cache = False  # with a cache transformers lets packed examples see one another
        fast = FastPath(module)
        self.fast = None if fast.why_not() else fast
        self.made = torch.empty(0)

    @contextmanager
    def teaching(self, student: PeftModel | PreTrainedModel, fast: FastPath | None) -> Iterator[None]:
        """Let the loss of a student, on the fast path or on the model's own, be mixed with the teacher's answers."""
        if fast:
            fast.told = self.told
            yield
            fast.told = None
            return
        inner = FastPath(student).inner
        stock, inner.loss_function = inner.loss_function, self.loss
        try:
            yield
        finally:
            inner.loss_function = stock

    @torch.no_grad()
    def see(self, batch: Mapping[str, Tensor]) -> None:
        """Answer a batch: hidden states before the head `(rows, tokens, d)`, or logits `(rows, tokens, vocabulary)`."""
        if self.fast:
            self.fast.see(batch["position_ids"])
        with self.fast.switched_on() if self.fast else nullcontext():
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            self.made = self.module(**inputs, use_cache=False).logits

    def told(self, kept: Tensor) -> Taught:
        """The answers to the tokens of the last batch that are `kept` (rows, tokens)."""
        made = self.made[kept]  # (kept tokens, d or vocabulary)
        head: Callable[[Tensor], Tensor] = self.fast.head if self.fast else lambda logits: logits

        def logits(part: slice) -> Tensor:
            with torch.no_grad():
                return head(made[part])

        return Taught(logits, self.alpha, self.temperature)

    def loss(
        self, logits: Tensor, *_: object, shift_labels: Tensor, num_items_in_batch: Tensor | None = None, **__: object
    ) -> Tensor:
        """The loss of a student whose own attention and head made the logits `(rows, tokens, vocabulary)`."""
        told = self.told(shift_labels != IGNORED)
        total = cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), IGNORED, told)
        return total / total_over(shift_labels, num_items_in_batch)

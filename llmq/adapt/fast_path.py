"""Faster attention and loss for training, used only where they give what the model itself gives."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from llmq.adapt.fused_loss import linear_cross_entropy
from llmq.adapt.neighbours import neighbours_reach
from llmq.adapt.packing import Collator
from llmq.adapt.segment_attention import Segment, attend, segments_of
from llmq.data.tokens import IGNORED, Tokens
from llmq.errors import UserError

ATTENTION = "llmq_segments"
DROPOUTS = ("attention_dropout", "attn_pdrop")
TOLERANCE = 0.02
"""Largest relative difference of the two losses on a probe; bfloat16 alone makes a tenth of it."""


class FastPath:
    """Attention within segments, and the head's loss without its logits, switched onto a model while it trains."""

    def __init__(self, model: Any):
        self.model = model
        self.inner = model.get_base_model()
        self.head = self.inner.get_output_embeddings()
        self.stock_attention = self.inner.config._attn_implementation
        self.segments: list[Segment] = []

    def see(self, batch: dict[str, Any]) -> None:
        """Take note of where the examples of the coming batch lie."""
        self.segments = segments_of(batch["position_ids"])

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        return attend(query, key, value, scaling, self.segments), None

    def _loss(
        self,
        logits: Any,
        labels: Any = None,
        vocab_size: int = 0,
        num_items_in_batch: Any = None,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        # `logits` are hidden states here: while switched on, the head hands through what it is given.
        total = linear_cross_entropy(logits.flatten(0, -2), self.head, shift_labels.flatten(), IGNORED)
        return total / ((shift_labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """The model as it trains fast."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, self._attention)
        self.inner.set_attn_implementation(ATTENTION)
        stock_loss = self.inner.loss_function
        self.inner.loss_function = self._loss
        self.head.forward = lambda hidden: hidden
        try:
            yield
        finally:
            self.inner.set_attn_implementation(self.stock_attention)
            AttentionInterface._global_mapping.pop(ATTENTION)  # or it would keep this model in memory
            self.inner.loss_function = stock_loss
            del self.head.forward

    def why_not(self) -> str:
        """Why this model must train by its own attention and loss; empty if it need not."""
        import torch

        config = self.inner.config.get_text_config()
        if type(self.head) is not torch.nn.Linear or self.head.weight.requires_grad:
            return "the output head is trained or is no plain linear layer"
        for special in ("attn_logit_softcapping", "sliding_window", "attention_chunk_size", *DROPOUTS):
            if getattr(config, special, None):
                return f"its attention has {special}"
        if not getattr(self.inner, "_supports_attention_backend", False):
            return "its attention cannot be exchanged"
        if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
            return "the output head is sharded"
        fast, stock = self._probe()
        if abs(fast - stock) <= TOLERANCE * abs(stock):
            return ""
        return f"on a probe they give a loss of {fast:.4f}, the model itself {stock:.4f}"

    def neighbours_reach(self, packed: bool, switched_on: bool, autocast: Any = None) -> str:
        """How an example depends on the others of its batch, by this path or the model itself; empty if it does not."""

        def run(ids: Any, positions: Any) -> Any:
            self.see({"position_ids": positions})
            return self.model(input_ids=ids, position_ids=positions).logits

        with self.switched_on() if switched_on else nullcontext():
            return neighbours_reach(self.model, run, packed, autocast)

    def _probe(self) -> tuple[float, float]:
        """The loss of two short examples in rows of their own by this path, and by the model itself."""
        batch = self._on_device(Collator(0)([[e] for e in self._random_examples(2)]))
        self.see(batch)
        with self.switched_on():
            fast = float(self._evaluated(batch).loss)
        return fast, float(self._evaluated(batch).loss)

    def _random_examples(self, count: int) -> list[Tokens]:
        import torch

        vocabulary = self.inner.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
        return [Tokens(tuple(row), (True,) * len(row)) for row in ids]

    def _evaluated(self, inputs: dict[str, Any]) -> Any:
        import torch

        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            made = self.model(**inputs)
        self.model.train(training)
        return made

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.head.weight.device) for k, v in batch.items() if k != "tokens"}


@dataclass(frozen=True)
class Way:
    """How a model trains: by the fast path or its own, several examples to a row or one; and why not otherwise."""

    fast: FastPath | None
    packing: bool
    why_slow: str
    why_unpacked: str


def choose(model: Any, packing: bool, batch_size: int, autocast: Any = None) -> Way:
    """The fastest way to train in which no example depends on another, as probes of the model itself show.

    Raises `UserError` where the rows of a batch, or their padding, reach one another even with one example a row.
    """
    fast = FastPath(model)
    slow = fast.why_not()
    found: dict[tuple[bool, bool], str] = {}
    for packed in (True, False) if packing else (False,):
        for is_fast in (True, False) if not slow else (False,):
            found[packed, is_fast] = fast.neighbours_reach(packed, is_fast, autocast)
            if not found[packed, is_fast]:
                why_slow = slow or found.get((packed, True), "")
                return Way(fast if is_fast else None, packed, why_slow, found.get((True, False), ""))
    if batch_size > 1:
        raise UserError(
            f"an example depends on the padding and the other rows of its batch ({found[False, False]}); "
            "set per_device_train_batch_size: 1"
        )
    return Way(None if slow else fast, False, slow, found.get((True, False), ""))  # a row alone has neither

"""Faster attention and loss for training, used only where they give what the model itself gives."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llmq.adapt.fused_loss import linear_cross_entropy
from llmq.adapt.packing import Collator
from llmq.adapt.segment_attention import Segment, attend, segments_of
from llmq.data.tokens import IGNORED, Tokens

logger = logging.getLogger(__name__)
ATTENTION = "llmq_segments"
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

    def _loss(self, logits: Any, num_items_in_batch: Any = None, shift_labels: Any = None, **kwargs: Any) -> Any:
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
        self.inner.loss_function = partial(self._loss)
        self.head.forward = lambda hidden: hidden
        try:
            yield
        finally:
            self.inner.set_attn_implementation(self.stock_attention)
            self.inner.loss_function = stock_loss
            del self.head.forward

    def why_not(self) -> str:
        """Why this model must train by its own attention and loss; empty if it need not."""
        import torch

        config = self.inner.config.get_text_config()
        if type(self.head) is not torch.nn.Linear or self.head.weight.requires_grad:
            return "the output head is trained or is no plain linear layer"
        for special in ("attn_logit_softcapping", "sliding_window", "attention_chunk_size"):
            if getattr(config, special, None):
                return f"its attention has {special}"
        if not getattr(self.inner, "_supports_attention_backend", False):
            return "its attention cannot be exchanged"
        fast, stock = self._probe()
        if not abs(fast - stock) <= TOLERANCE * abs(stock):
            return f"on a probe they give a loss of {fast:.4f} where the model itself gives {stock:.4f}"
        return ""

    def _probe(self) -> tuple[float, float]:
        """The loss of two short examples: packed in one row by the fast path, and each alone by the model itself."""
        import torch

        ids = torch.randint(
            self.inner.config.get_text_config().vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)
        ).tolist()
        examples = [Tokens(tuple(row), (True,) * len(row)) for row in ids]
        collate = Collator(0)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            alone = [float(self.model(**self._on_device(collate([[e]]))).loss) for e in examples]
            packed = self._on_device(collate([examples]))
            self.see(packed)
            with self.switched_on():
                together = float(self.model(**packed).loss)
        self.model.train(training)
        return together, sum(alone) / len(alone)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.head.weight.device) for k, v in batch.items()}

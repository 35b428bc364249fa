"""Weights that processes share out among them (FSDP2), on processors as on cards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainingArguments


@contextmanager
def let_processors_shard(args: TrainingArguments) -> Iterator[None]:
    """Let an `Accelerator` that is made in the block share weights out over processors, where `args` ask for it.

    PyTorch does so over gloo. accelerate 1.15 reads its FSDP settings only for processes that it takes for those of
    cards, and trains plain data parallelism on processors without a message; so they count as such while it decides.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    told = PartialState._shared_state
    if not args.fsdp or told.get("distributed_type") != DistributedType.MULTI_CPU:
        yield
        return
    # Blocks whose outputs are views warn of changes in their place, at every forward; llmq makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    told["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if told["distributed_type"] == DistributedType.MULTI_GPU:  # it decided otherwise
            told["distributed_type"] = DistributedType.MULTI_CPU


def share_held(model: Module) -> dict[str, float]:
    """The share of a model's weights that this process holds, as a note; none where it holds all."""
    parameters = list(model.parameters())
    whole = sum(p.numel() for p in parameters)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)
    return {"share_of_weights_held": round(held / whole, 4)} if held < whole else {}

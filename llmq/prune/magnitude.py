"""Pruning by magnitude."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llmq.artifact import Artifact
from llmq.models.vision import KINDS
from llmq.prune.masks import by_magnitude
from llmq.prune.sparsity import PruneStep, Pruning, Sparsity, write_pruned
from llmq.types import Context, Step


class Magnitude(PruneStep, Step):
    """Sets the smallest weights of every layer to zero, without calibration: the baseline of the others.

    The model stays dense: neither file nor time shrinks by itself. Of a language model linear layers are pruned, but
    not the output head; of an image model all convolutions and linear layers, the first and the last too unless
    `modules` skips them, and an n:m pattern runs over neighbouring input channels.
    """

    suits: ClassVar[frozenset[str]] = KINDS | {"causal-lm"}
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Write the pruned model to `folder`."""
        return write_pruned(self, artifact, folder, context, _Magnitude)


class _Magnitude(Pruning):
    def pruned(self, weight: Any, shared: Any, its: Sparsity) -> Any:
        return weight.masked_fill(by_magnitude(weight, its.sparsity, its.of_each), 0)

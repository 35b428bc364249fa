"""Pruning by weights and activations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from llmq.artifact import Artifact
from llmq.calibration import Calibrated
from llmq.prune.masks import by_magnitude, by_wanda
from llmq.prune.sparsity import PruneStep, Pruning, Sparsity, write_pruned
from llmq.types import Context, Step


class Wanda(PruneStep, Calibrated, Step):
    """Wanda (Sun et al. 2023): drops the weights whose magnitude times the norm of their input is least.

    The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the pruned model to `folder`; goes on after a kill where the last block ended."""
        windows, notes = self.windows(artifact, context.seed)
        return write_pruned(self, artifact, folder, context, _Wanda, windows, self.true_sequential, calibration=notes)


class _Wanda(Pruning):
    gathers: Literal["hessian", "squares"] | None = "squares"

    def pruned(self, weight: Any, shared: Any, its: Sparsity) -> Any:
        if not bool(shared.any()):  # an expert that no token came to: its weights alone can tell
            return weight.masked_fill(by_magnitude(weight, its.sparsity, its.of_each), 0)
        return weight.masked_fill(by_wanda(weight, shared, its.sparsity, its.of_each), 0)

"""Wanda (Sun et al. 2023): drops the weights whose magnitude times the norm of their input is least.

The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmq.artifact import Artifact
from llmq.matrix.gram import Kind
from llmq.matrix.masks import by_magnitude, by_wanda
from llmq.sparsity import PruneStep, Pruning, Sparsity
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work


class Wanda(PruneStep[LanguageModel], Calibrated):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        return self.weighed(before, super().foresee(before))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the pruned model to `folder`; a resumed run goes on after the last whole block."""
        windows, notes = self.windows(artifact, context.seed)
        change = partial(_Wanda, by_loss=self.by_loss)
        return self.write(artifact, folder, context, change, windows, self.true_sequential, calibration=notes)


class _Wanda(Pruning):
    gathers: Kind | None = "squares"  # ||x||² of each input, (inputs,)

    def pruned(self, weight: "Tensor", shared: "Tensor | None", level: Sparsity) -> "Tensor":
        if shared is None or not bool(shared.any()):  # an expert that no token came to: its weights alone can tell
            return weight.masked_fill(by_magnitude(weight, level.sparsity, level.of_each), 0)
        return weight.masked_fill(by_wanda(weight, shared, level.sparsity, level.of_each), 0)  # (outputs, inputs)

"""ALPS (Meng et al. 2024): prunes by a search that decides each weight with all others known; nearer than SparseGPT.

The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmq.artifact import Artifact
from llmq.matrix.alps import alps
from llmq.matrix.gram import Kind
from llmq.sparsity import PruneStep, Pruning, Sparsity
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work


class Alps(PruneStep[LanguageModel], Calibrated):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    damp_percent: float = Field(0.01, gt=0, lt=1, description="of the mean curvature")

    gathers_products: ClassVar[bool] = True

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        return self.weighed(before, super().foresee(before))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        """Calibrate, and write the pruned model to `folder`; a resumed run goes on after the last whole block."""
        windows, notes = self.windows(artifact, context.seed)
        change = partial(_Alps, damp_percent=self.damp_percent, by_loss=self.by_loss)
        return self.write(artifact, folder, context, change, windows, self.true_sequential, calibration=notes)


class _Alps(Pruning):
    gathers: Kind | None = "hessian"  # `X^T X`, (inputs, inputs)

    def __init__(self, sparsities: Mapping[str, Sparsity], damp_percent: float, by_loss: bool):
        super().__init__(sparsities, by_loss)
        self.damp_percent = damp_percent

    def pruned(self, weight: "Tensor", shared: "Tensor | None", its: Sparsity) -> "Tensor":
        assert shared is not None
        return alps(weight, shared, self.damp_percent, its.sparsity, its.of_each)  # (outputs, inputs)

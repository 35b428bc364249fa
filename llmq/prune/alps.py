"""ALPS (Meng et al. 2024): prunes by a search that decides each weight with all others known; nearer than SparseGPT.

The model stays dense: neither file nor time shrinks by itself. Embeddings and output head are not pruned.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmq.artifact import Artifact
from llmq.matrix.alps import USUAL, alps
from llmq.matrix.gram import Kind
from llmq.sparsity import PruneStep, Pruning, Sparsity
from llmq.text.calibration import Calibrated
from llmq.text.family import LanguageModel
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.sketch import Sketch, Work


COPIED = 40
"""The bytes that a round reads and writes for each weight."""


class Alps(PruneStep[LanguageModel], Calibrated):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})

    damp_percent: float = Field(0.01, gt=0, lt=1, description="of the mean curvature")

    gathers_products: ClassVar[bool] = True

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same dense tensors, and two products and some copies of each matrix in each round."""
        from llmq.sketch import Work
        from llmq.text.sizing.network import as_text

        made, done = self.weighed(before, super().foresee(before))
        layers = as_text(before).linears
        products = float(sum(4 * part.shape[-1] * part.weights for part in layers))
        copies = float(sum(COPIED * part.weights for part in layers))
        return made, done.plus(Work(0, {"float32": USUAL * products, "copy": USUAL * copies}))

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

    def pruned(self, weight: "Tensor", shared: "Tensor | None", level: Sparsity) -> "Tensor":
        assert shared is not None
        return alps(weight, shared, self.damp_percent, level.sparsity, level.of_each)  # (outputs, inputs)
